"""The functions that a request lets a model call. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """One that a model may call."""

    name: str
    parameters: dict[str, Any]
    """The JSON schema of its arguments, of type object."""
    strict: bool
    """Whether arguments must fit the schema even where the model is free to call or not."""
    definition: dict[str, Any]
    """For chat templates: {"type": "function", "function": {"name", "description", "parameters", ...}}."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a model may call in its answer, whether it must, and how often.

    RequestError for a definition that cannot be used; the message begins with the path to what is wrong.
    """

    listed: tuple[Mapping[str, Any], ...]
    """As chat requests give them: {"type": "function", "function": {"name", "description", "parameters", "strict"}}."""
    choice: Literal["auto", "required"] = "auto"
    """Whether it must call one."""
    named: str | None = None
    """The only one it may call, and must, once."""
    parallel: bool = True
    """Whether it may call several."""
    shape: StructuredOutputsParams | None = None
    """Of an answer that calls nothing, where it may choose: then an answer is calls or that, never both."""
    functions: tuple[Function, ...] = field(init=False)
    """Those it may call."""

    def __post_init__(self) -> None:
        read: dict[str, Function] = {}
        for position, given in enumerate(self.listed):
            function = _read_function(given, f"tools[{position}]")
            if function.name in read:
                raise _refusal(f"tools[{position}].function.name", function.name, "each function a name of its own")
            read[function.name] = function
        if self.named is not None:
            if self.named not in read:
                raise _refusal("tool_choice.function.name", self.named, f"the name of a function: {', '.join(read)}")
            read = {self.named: read[self.named]}
            object.__setattr__(self, "choice", "required")
            object.__setattr__(self, "parallel", False)
        if self.choice == "required":
            object.__setattr__(self, "shape", None)
        object.__setattr__(self, "functions", tuple(read.values()))


def _read_function(given: Any, path: str) -> Function:
    if not isinstance(given, Mapping) or given.get("type") != "function":
        raise _refusal(path, given, 'a function, such as {"type": "function", "function": {"name": "f"}}')
    path += ".function"
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise _refusal(path, function, "a map with a name, and with a description and parameters if it has them")
    name, description, strict, parameters = (
        function.get(key) for key in ("name", "description", "strict", "parameters")
    )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refusal(f"{path}.name", name, "1 to 64 letters, digits, underscores or hyphens")
    if not isinstance(description, str | None):
        raise _refusal(f"{path}.description", description, "text")
    if not isinstance(strict, bool | None):
        raise _refusal(f"{path}.strict", strict, "true or false")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise _refusal(f"{path}.parameters", parameters, "a JSON schema of type object, or nothing")
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list | tuple) and "object" in kind):
        raise _refusal(f"{path}.parameters.type", kind, "'object': arguments have names")
    # Some templates fail where a description is missing.
    shown = {key: value for key, value in function.items() if key != "strict" and value is not None}
    shown |= {"description": description or "", "parameters": dict(parameters)}
    return Function(
        name,
        {**parameters, "type": "object"},
        bool(strict),
        {"type": "function", "function": shown},
    )


def _refusal(path: str, value: Any, accepted: str) -> RequestError:
    text = repr(value)
    return RequestError(f"{path}={text if len(text) <= 80 else text[:77] + '...'} is not accepted: give {accepted}")
