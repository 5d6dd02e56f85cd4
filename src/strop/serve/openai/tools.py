"""What a request says about tools, and what the server needs to read a model's calls of them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct

from strop.core.request import StructuredOutputsParams
from strop.serve.openai.errors import ApiError
from strop.serve.openai.fields import honoured, shown

ToolName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_.-]+$")]
ChoiceMode = Literal["none", "auto", "required"]


class ToolDelta(Protocol):
    """A fragment of a call: `id` and `name` come with a call's first one only; arguments add up to JSON text."""

    @property
    def index(self) -> int:
        """Which call of the answer, from 0."""
        ...

    @property
    def id(self) -> str | None: ...  # noqa: D102

    @property
    def name(self) -> str | None: ...  # noqa: D102

    @property
    def arguments(self) -> str: ...  # noqa: D102


class ToolCallParser(Protocol):
    """Reads the text of one answer."""

    def push(self, text: str, ended: bool) -> "list[ToolDelta | str]":
        """What the next piece of text makes certain: plain text and fragments of calls, in order."""
        ...


class ToolSupport(Protocol):
    """How this server's model writes calls."""

    def parser(self, tools: "Tools") -> ToolCallParser:
        """For one answer."""
        ...

    def grammar(self, tools: "Tools") -> StructuredOutputsParams | None:
        """The shape that forces the answer to be the calls that were asked for; None where it is free."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools a model may call in its answer."""

    listed: tuple[dict[str, Any], ...]
    """As templates know them: {"type": "function", "function": {"name", "description", "parameters"}}."""
    choice: Literal["auto", "required"] = "auto"
    """Whether it must call one."""
    named: str | None = None
    """The only one it may call, and must."""
    parallel: bool = True
    """Whether it may call several."""


class FunctionSpec(Struct, forbid_unknown_fields=True):
    """A function that the client can run."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, honoured("JSON schema of its arguments", cap="schema_bytes")] = None
    strict: Annotated[bool | None, honoured("calls that are forced follow the schema in any case")] = None


class ChatTool(Struct, tag="function", tag_field="type", forbid_unknown_fields=True):
    """A function, as chat requests give it."""

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
    mode: ChoiceMode | None,
    named: str | None,
    allowed: list[str] | None,
    parallel: bool | None,
    support: ToolSupport | None,
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
    return Tools(
        tuple(listed_tool(function) for function in usable.values()),
        "required" if mode == "required" or named is not None else "auto",
        named,
        parallel is not False,
    )


def forced_or(
    shape: StructuredOutputsParams | None, tools: Tools | None, support: ToolSupport | None, param: str
) -> StructuredOutputsParams | None:
    """The shape of an answer: calls that are forced, else `shape`, which the field `param` asked for. ApiError if the
    model may choose between the two."""
    if tools is None or support is None:
        return shape
    forced = support.grammar(tools)
    if forced is None and shape is not None:
        raise ApiError(
            f"{param} and tools exclude each other while the model may choose to call: set tool_choice to none or"
            " required",
            param=param,
        )
    return forced


def listed_tool(function: FunctionSpec) -> dict[str, Any]:
    """As templates know it."""
    listed: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        listed["description"] = function.description
    listed["parameters"] = function.parameters or {"type": "object", "properties": {}}  # templates look into it
    return {"type": "function", "function": listed}
