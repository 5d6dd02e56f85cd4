"""What a request says about tools."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from strop.core.errors import RequestError
from strop.core.request import SamplingParams, StructuredOutputsParams
from strop.serve.openai.errors import ApiError
from strop.serve.openai.fields import honoured, shown
from strop.serve.tool_calls import Tools, ToolSupport

ToolName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
ChoiceMode = Literal["none", "auto", "required"]


class FunctionSpec(Struct, forbid_unknown_fields=True):
    """A function that the client can run."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, honoured("JSON schema of its arguments", cap="schema_bytes")] = None
    strict: Annotated[bool | None, honoured("calls that are forced follow the schema in any case")] = None


class ChatTool(Struct, forbid_unknown_fields=True):
    """A function, as chat requests give it."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Struct, forbid_unknown_fields=True):
    """A function by its name."""

    name: ToolName


class ChatNamedTool(Struct, tag="function", tag_field="type", forbid_unknown_fields=True):
    """The function that must be called."""

    function: NamedFunction


class ChatToolReference(Struct, forbid_unknown_fields=True):
    """One of the tools of the request."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatAllowedTools(Struct, forbid_unknown_fields=True):
    """Some of the tools of the request."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChatToolReference], Meta(min_length=1)]


class ChatAllowedToolChoice(Struct, tag="allowed_tools", tag_field="type", forbid_unknown_fields=True):
    """Only some of the tools may be called."""

    allowed_tools: ChatAllowedTools


def chosen_tools(
    functions: list[FunctionSpec],
    support: ToolSupport | None,
    *,
    mode: ChoiceMode | None = None,
    named: str | None = None,
    allowed: list[str] | None = None,
    parallel: bool | None = None,
) -> Tools | None:
    """What the fields tools, tool_choice and parallel_tool_calls come to; None where nothing can be called.

    Args:
        mode: None says auto where there are tools.
        named: the one function to call.
        allowed: those that may be called, if not all.

    ApiError for a choice that the tools do not offer, and where the model's calls could not be read.
    """
    by_name = {function.name: function for function in functions}
    if len(by_name) < len(functions):
        raise ApiError("tools has two functions of the same name: give each its own", param="tools")
    for name in [named] if named is not None else allowed or ():
        if name not in by_name:
            raise ApiError(f"tool_choice names {shown(name)}, which is not among the tools", param="tool_choice")
    if not functions:
        if mode == "required":
            raise ApiError("tool_choice=required, but there are no tools: give tools", param="tool_choice")
        return None
    if mode == "none":
        return None
    if support is None:
        raise ApiError("this server was started without tool calls: leave tools out", param="tools")
    usable = by_name if allowed is None else {name: by_name[name] for name in allowed}
    try:
        return Tools(
            tuple(_listed(function) for function in usable.values()),
            "required" if mode == "required" or named is not None else "auto",
            named,
            parallel is not False,
        )
    except RequestError as error:
        raise ApiError(str(error), param="tools") from None


def forced_or(
    shape: StructuredOutputsParams | None, tools: Tools | None, support: ToolSupport | None, param: str
) -> StructuredOutputsParams | None:
    """The shape of an answer: that of calls, else `shape`, which the field `param` asked for. ApiError if the model may
    choose between the two."""
    if tools is None or support is None:
        return shape
    if shape is not None and tools.choice == "auto":
        raise ApiError(
            f"{param} and tools exclude each other while the model may choose to call: set tool_choice to none or"
            " required",
            param=param,
        )
    return support.grammar(tools)


def told(
    messages: list[dict[str, Any]], tools: Tools | None, support: ToolSupport | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and the template's variables, that tell the model of its tools."""
    if support is None:
        return messages, {}
    listed = support.template_tools(tools)
    return support.messages(messages, tools), {} if listed is None else {"tools": listed}


def with_call_tokens(params: SamplingParams, tools: Tools | None, support: ToolSupport | None) -> SamplingParams:
    """`params` under which the text of an answer keeps the control tokens that calls are found by."""
    if tools is None or support is None or not support.form.special_tokens:
        return params
    return replace(params, skip_special_tokens=False)


def _listed(function: FunctionSpec) -> dict[str, Any]:
    """As chat requests give it, without nulls."""
    fields = {name: getattr(function, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}
