"""What a request says about tools."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from strop.core.errors import RequestError
from strop.core.request import SamplingParams, StructuredOutputsParams
from strop.serve.openai.errors import ApiError
from strop.serve.openai.exchange import Asked
from strop.serve.openai.fields import honoured, shown
from strop.serve.tool_calls import Tools, ToolSupport

ToolName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
ChoiceMode = Literal["none", "auto", "required"]
Strict = Annotated[
    bool | None, honoured("arguments follow the schema also where the model may choose to call; forced ones always do")
]


class FunctionSpec(Struct, forbid_unknown_fields=True):
    """A function that the client can run."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, honoured("JSON schema of its arguments", cap="schema_bytes")] = None
    strict: Strict = None


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
    *,
    mode: ChoiceMode | None = None,
    named: str | None = None,
    allowed: list[str] | None = None,
    parallel: bool | None = None,
    shape: StructuredOutputsParams | None = None,
) -> Tools | None:
    """What the fields tools, tool_choice and parallel_tool_calls come to; None where nothing can be called.

    Args:
        mode: None says auto where there are tools.
        named: the one function to call.
        allowed: those that may be called, if not all.
        shape: of an answer that calls nothing.

    ApiError for a choice that the tools do not offer.
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
    usable = by_name if allowed is None else {name: by_name[name] for name in allowed}
    try:
        return Tools(
            tuple(_listed(function) for function in usable.values()),
            "required" if mode == "required" or named is not None else "auto",
            named,
            parallel is not False,
            shape,
        )
    except RequestError as error:
        raise ApiError(str(error), param="tools") from None


def told(
    messages: list[dict[str, Any]], tools: Tools | None, support: ToolSupport
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and the template's variables, that tell the model of its tools."""
    listed = support.template_tools(tools)
    return support.messages(messages, tools), {} if listed is None else {"tools": listed}


def asked_with_tools(
    messages: list[dict[str, Any]],
    template: dict[str, Any],
    params: SamplingParams,
    tools: Tools | None,
    support: ToolSupport,
) -> Asked:
    """What to ask the engine for an answer of which calls may be a part. ApiError if they could not be told from the
    shape that it is to have."""
    messages, variables = told(messages, tools, support)
    if tools is not None:
        try:
            params = replace(params, structured_outputs=support.grammar(tools))
        except RequestError as error:
            raise ApiError(str(error), param="tools") from None
        if support.form.special_tokens:  # the answer's text keeps the control tokens that calls are found by
            params = replace(params, skip_special_tokens=False)
    return Asked(messages, template | variables, params)


def _listed(function: FunctionSpec) -> dict[str, Any]:
    """As chat requests give it, without nulls."""
    fields = {name: getattr(function, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}
