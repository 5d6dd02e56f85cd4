"""Chat messages as clients write them, and as templates read them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Struct

from strop.serve.openai.errors import ApiError
from strop.serve.openai.fields import honoured, ignored, refused, shown

_NO_BREAKPOINTS = "prefixes are cached wherever requests share them"


class TextPart(Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A piece of text."""

    text: str
    prompt_cache_breakpoint: Annotated[None, refused(_NO_BREAKPOINTS)] = None


class RefusalPart(Struct, tag="refusal", tag_field="type", forbid_unknown_fields=True):
    """A piece of text by which an assistant declined."""

    refusal: str


Part = TextPart | RefusalPart
Text = str | list[Part]


class CalledFunction(Struct, forbid_unknown_fields=True):
    """A call's function."""

    name: str
    arguments: Annotated[str, honoured("JSON text; templates see the value")]
    parsed_arguments: Annotated[Any, ignored("the Python client's own")] = None


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call that an assistant made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: Annotated[int | None, ignored("streamed calls have it")] = None


class SystemMessage(Struct, tag="system", tag_field="role", forbid_unknown_fields=True):
    """Instructions."""

    content: Text
    name: str | None = None


class DeveloperMessage(Struct, tag="developer", tag_field="role", forbid_unknown_fields=True):
    """Instructions; to a template that does not know the role they are the system's."""

    content: Text
    name: str | None = None


class UserMessage(Struct, tag="user", tag_field="role", forbid_unknown_fields=True):
    """What a user says."""

    content: Text
    name: str | None = None


class AssistantMessage(Struct, tag="assistant", tag_field="role", forbid_unknown_fields=True):
    """An earlier answer."""

    content: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: Annotated[str | None, honoured("the content, where there is none")] = None
    reasoning_content: Annotated[str | None, honoured("for templates that show earlier reasoning")] = None
    reasoning: Annotated[str | None, honoured("another name of reasoning_content")] = None
    annotations: Annotated[list[Any] | None, ignored("")] = None
    parsed: Annotated[Any, ignored("the Python client's own")] = None
    audio: Annotated[None, refused("this server reads and writes text only")] = None
    function_call: Annotated[None, refused("this is the deprecated form: give tool_calls")] = None


class ToolMessage(Struct, tag="tool", tag_field="role", forbid_unknown_fields=True):
    """What a call gave."""

    content: Text
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def template_messages(messages: Sequence[Message], chat_template: str) -> list[dict[str, Any]]:
    """What `chat_template` is to render, but for the calls: see ToolSupport.messages."""
    return [_template_message(message, chat_template) for message in messages]


def text_of(content: str | Sequence[Part]) -> str:
    """The text of a content; parts become lines."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def template_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of the past."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def template_role(role: str, chat_template: str) -> str:
    """`role`, or what stands for it in a template that does not know it."""
    return "system" if role == "developer" and "developer" not in chat_template else role


# Names that a template's variables cannot have: they are fields of the request, or mean something on the way there.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"self", "tokenizer", "prompt", "vocab_size"}
)


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs, if none of them is something else. ApiError if one is."""
    for name in given or {}:
        if name in _RESERVED:
            raise ApiError(
                f"chat_template_kwargs.{name} is not a variable of the template's own: give the field of the request,"
                " or leave it out",
                param="chat_template_kwargs",
            )
    return dict(given or {})


def effort_variable(effort: str | None, chat_template: str, param: str) -> dict[str, Any]:
    """The template's variable for reasoning_effort; `none` may also mean that it is not to think. ApiError if the
    template has no such variable."""
    if effort is None:
        return {}
    if "reasoning_effort" in chat_template:
        return {"reasoning_effort": effort}
    can_be_turned_off = "enable_thinking" in chat_template
    if effort == "none" and can_be_turned_off:
        return {"enable_thinking": False}
    raise ApiError(
        f"{param}={shown(effort)} is not supported: this model's chat template knows no reasoning effort"
        f"{', only none' if can_be_turned_off else ''}; leave it out",
        param=param,
    )


def _template_message(message: Message, chat_template: str) -> dict[str, Any]:
    role = template_role(str(message.__struct_config__.tag), chat_template)
    if isinstance(message, AssistantMessage):
        return {"role": role, **_assistant(message)}
    fields: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        fields["name"] = message.name
    if isinstance(message, ToolMessage):
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    content = message.content if message.content is not None else message.refusal
    fields: dict[str, Any] = {"content": None if content is None else text_of(content)}
    if message.tool_calls:
        calls = message.tool_calls
        fields["tool_calls"] = [template_call(call.id, call.function.name, call.function.arguments) for call in calls]
    elif content is None:
        fields["content"] = ""
    if message.name is not None:
        fields["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if reasoning is not None:
        fields["reasoning_content"] = reasoning
    return fields
