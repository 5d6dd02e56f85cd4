"""Items of /v1/responses: what a client sends and what it gets back."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Struct, field

from strop.serve.openai.errors import ApiError
from strop.serve.openai.fields import honoured, ignored, refused
from strop.serve.openai.logprobs import ContentLogprob
from strop.serve.openai.messages import template_call, template_role

ItemStatus = Literal["in_progress", "completed", "incomplete"]
_ONLY_FUNCTIONS = "only plain functions are called"


class InputText(Struct, tag="input_text", tag_field="type", forbid_unknown_fields=True):
    """A piece of text for the model."""

    text: str
    prompt_cache_breakpoint: Annotated[None, refused("prefixes are cached wherever requests share them")] = None


class OutputTextInput(Struct, tag="output_text", tag_field="type", forbid_unknown_fields=True):
    """A piece of an earlier answer."""

    text: str
    annotations: Annotated[list[Any] | None, ignored("")] = None
    logprobs: Annotated[list[Any] | None, ignored("")] = None
    parsed: Annotated[Any, ignored("the Python client's own")] = None


class RefusalInput(Struct, tag="refusal", tag_field="type", forbid_unknown_fields=True):
    """A piece of an earlier answer that declined."""

    refusal: str


class MessageItem(Struct, tag="message", tag_field="type", forbid_unknown_fields=True):
    """A message; its `type` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputTextInput | RefusalInput]
    id: Annotated[str | None, ignored("")] = None
    status: Annotated[ItemStatus | None, ignored("")] = None
    phase: Annotated[str | None, ignored("")] = None


class FunctionCallItem(Struct, tag="function_call", tag_field="type", forbid_unknown_fields=True):
    """A call that the model made."""

    call_id: str
    name: str
    arguments: str
    id: Annotated[str | None, ignored("")] = None
    status: Annotated[ItemStatus | None, ignored("")] = None
    namespace: Annotated[None, refused(_ONLY_FUNCTIONS)] = None
    caller: Annotated[None, refused(_ONLY_FUNCTIONS)] = None
    is_async: Annotated[bool | None, ignored("")] = field(default=None, name="async")
    parsed_arguments: Annotated[Any, ignored("the Python client's own")] = None


class FunctionCallOutputItem(Struct, tag="function_call_output", tag_field="type", forbid_unknown_fields=True):
    """What a call gave."""

    call_id: str
    output: str | list[InputText | OutputTextInput]
    id: Annotated[str | None, ignored("")] = None
    status: Annotated[ItemStatus | None, ignored("")] = None
    name: Annotated[str | None, ignored("")] = None
    namespace: Annotated[None, refused(_ONLY_FUNCTIONS)] = None
    caller: Annotated[None, refused(_ONLY_FUNCTIONS)] = None


class ReasoningTextInput(Struct, tag="reasoning_text", tag_field="type", forbid_unknown_fields=True):
    """What the model thought."""

    text: str


class ReasoningItem(Struct, tag="reasoning", tag_field="type", forbid_unknown_fields=True):
    """Reasoning of an earlier answer."""

    id: Annotated[str | None, ignored("")] = None
    summary: Annotated[list[Any] | None, ignored("")] = None
    content: Annotated[
        list[ReasoningTextInput] | None, honoured("for templates that show earlier reasoning, with the answer after it")
    ] = None
    encrypted_content: Annotated[str | None, ignored("")] = None
    status: Annotated[ItemStatus | None, ignored("")] = None


InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


class OutputText(Struct, tag="output_text", tag_field="type"):
    """Text of an answer."""

    text: str
    annotations: list[Any]
    logprobs: list[ContentLogprob]


class OutputMessage(Struct, tag="message", tag_field="type", kw_only=True):
    """Text that the model answers."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputCall(Struct, tag="function_call", tag_field="type", kw_only=True):
    """A call that the model makes."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ReasoningText(Struct, tag="reasoning_text", tag_field="type"):
    """What the model thought."""

    text: str


class OutputReasoning(Struct, tag="reasoning", tag_field="type", kw_only=True):
    """What the model thought before it answered."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = field(default_factory=list)


OutputItem = OutputMessage | OutputCall | OutputReasoning


def item_messages(
    items: str | Sequence[InputItem], instructions: str | None, chat_template: str
) -> list[dict[str, Any]]:
    """What `chat_template` is to render. An answer and the calls that follow it are one message of the assistant.

    ApiError if nothing is left to answer.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    reasoning: dict[str, str] = {}  # for the message of the assistant that follows
    for item in items:
        if isinstance(item, ReasoningItem):
            reasoning = {"reasoning_content": "\n".join(part.text for part in item.content)} if item.content else {}
        elif isinstance(item, MessageItem):
            fields = {"role": template_role(item.role, chat_template), "content": _text(item.content)}
            messages.append(fields | (reasoning if item.role == "assistant" else {}))
            reasoning = {}
        elif isinstance(item, FunctionCallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, **reasoning})
                reasoning = {}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append(template_call(item.call_id, item.name, item.arguments))
        elif isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    if not messages:
        raise ApiError("input has no message to answer: give one", param="input")
    return messages


def _text(content: str | Sequence[InputText | OutputTextInput | RefusalInput]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, RefusalInput) else part.text for part in content)
