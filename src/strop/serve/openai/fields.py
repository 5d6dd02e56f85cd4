"""Request fields: each is honoured, has no effect, or is refused by name, as its annotation says.

The Structs that describe a request are the one place that knows its fields: bodies are decoded with them, errors are
explained from them, and docs/api.md and the OpenAPI document are generated from them.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from strop.serve.openai.errors import ApiError

T = TypeVar("T", bound=Struct)
Json = Any

_PATH = re.compile(r"(?P<problem>.*) - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that one request may ask for."""

    n: int = 32
    """Answers to one prompt."""
    prompts: int = 128
    """Prompts of one /v1/completions request."""
    choices: int = 256
    """Answers to all its prompts."""
    inputs: int = 2048
    """Texts of one /v1/embeddings request."""
    messages: int = 4096
    stop: int = 16
    """Stop strings, and stop token ids."""
    logprobs: int = 20
    logit_bias: int = 1024
    """Tokens with a bias."""
    tools: int = 128
    schema_bytes: int = 2**16
    """JSON schema (of an answer, or of one tool), regex, grammar or list of choices."""
    template_bytes: int = 2**18
    """Documents, and variables of the chat template."""
    depth: int = 64
    """How deeply free-form JSON may be nested."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a field."""

    kind: Literal["honoured", "ignored", "refused"]
    about: str
    accepted: tuple[Any, ...] = ()
    """If not empty, the only values that are taken (and null)."""
    cap: str | None = None
    """The field of Caps that limits a number, the length of a list or map, or (`_bytes`) the size of free-form JSON."""


_PLAIN = Rule("honoured", "")


def honoured(about: str, *, cap: str | None = None) -> Meta:
    """The field does what it says."""
    return _meta(Rule("honoured", about, cap=cap))


def only(*accepted: bool | str, about: str) -> Meta:
    """The field is honoured because what else it could say is refused."""
    return _meta(Rule("honoured", about, accepted), extra_json_schema={"enum": [*accepted, None]})


def ignored(about: str) -> Meta:
    """The field is taken, and changes no answer."""
    return _meta(Rule("ignored", about))


def refused(why: str) -> Meta:
    """For a field of type None: only null is taken."""
    return _meta(Rule("refused", why))


def _meta(rule: Rule, **more: Any) -> Meta:
    return Meta(description=rule.about or None, extra={"rule": rule}, **more)


# What a tag or a name may say in OpenAI's own API, and why it is nothing here.
_TEXT_ONLY = "this server reads and writes text only"
_HOSTED = "this server runs no tools of its own: give functions"
_REFUSED_VALUES = {
    **dict.fromkeys(["image_url", "input_audio", "file", "input_image", "input_file", "video_url"], _TEXT_ONLY),
    **dict.fromkeys(["web_search", "web_search_preview", "file_search", "code_interpreter", "mcp"], _HOSTED),
    **dict.fromkeys(["computer_use_preview", "image_generation", "local_shell", "shell"], _HOSTED),
    "custom": "tools whose input is not JSON are not supported: give functions",
    "item_reference": "nothing is stored: send the item itself",
    "function": "messages of this role are the deprecated form: send role tool with tool_call_id",
}


@dataclass(slots=True)
class Fields:
    """The fields of a request, nested ones as `messages[].content`."""

    rules: dict[str, Rule] = field(default_factory=dict)
    accepted: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """What fields with few values (and tags) may be."""

    def add(self, kind: Any, path: str) -> None:
        """Everything in a value of type `kind`."""
        for part in _alternatives(kind):
            if get_origin(part) is list:
                self.add(get_args(part)[0], f"{path}[]")
            elif get_origin(part) is Literal:
                self._accept(path, *get_args(part))
            elif isinstance(part, type) and issubclass(part, Struct):
                self._add_struct(part, path)

    def _accept(self, path: str, *values: Any) -> None:
        self.accepted[path] = tuple(dict.fromkeys((*self.accepted.get(path, ()), *values)))

    def _add_struct(self, kind: type[Struct], path: str) -> None:
        prefix = f"{path}." if path else ""
        config = kind.__struct_config__
        if config.tag_field is not None:
            tag_path = prefix + config.tag_field
            self.rules.setdefault(tag_path, _PLAIN)
            self._accept(tag_path, config.tag)
        for info in msgspec.structs.fields(kind):
            name = prefix + info.encode_name
            rule = rule_of(info.type) or _PLAIN
            if self.rules.setdefault(name, rule).kind != rule.kind:  # it means something in one alternative
                self.rules[name] = _PLAIN
            if rule.accepted:
                self.accepted[name] = rule.accepted
            self.add(info.type, name)


@functools.cache
def fields_of(kind: type[Struct]) -> Fields:
    """The fields of a request that `kind` describes."""
    fields = Fields()
    fields.add(kind, "")
    return fields


def rule_of(kind: Any) -> Rule | None:
    """The rule that `kind` is annotated with."""
    for note in getattr(kind, "__metadata__", ()):
        if isinstance(note, Meta) and note.extra:
            rule: Rule = note.extra["rule"]
            return rule
    return None


def decode(body: bytes, kind: type[T], caps: Caps, prepare: Callable[[Json], None] | None = None) -> T:
    """The request in `body`. ApiError (400) that names what is wrong with it, whatever the bytes.

    `prepare` may change the decoded JSON before it is looked at.
    """
    try:
        if prepare is None:
            request = _decoder(kind).decode(body)
        else:
            value = msgspec.json.decode(body)
            prepare(value)
            request = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply to be read") from None
    _check(request, "", caps)
    return request


@functools.cache
def _decoder(kind: type[T]) -> "msgspec.json.Decoder[T]":
    return msgspec.json.Decoder(kind)


def _check(value: Struct, prefix: str, caps: Caps) -> None:
    """What types alone do not say: accepted values and caps, also of nested Structs."""
    for name, attribute, rule in _checked(type(value)):
        item = getattr(value, attribute)
        path = prefix + name
        if item is None or item is msgspec.UNSET:
            continue
        if rule is not None and rule.accepted and item not in rule.accepted:
            raise ApiError(
                f"{path}={shown(item)} is not supported ({rule.about}): accepted are {_listed(rule.accepted)}",
                param=path,
            )
        if rule is not None and rule.cap is not None:
            _check_cap(item, path, rule.cap, caps)
        if isinstance(item, Struct):
            _check(item, f"{path}.", caps)
        elif isinstance(item, list) and item and isinstance(item[0], Struct):
            for i, entry in enumerate(item):
                _check(entry, f"{path}[{i}].", caps)


@functools.cache
def _checked(kind: type[Struct]) -> tuple[tuple[str, str, Rule | None], ...]:
    """(encoded name, attribute, rule) of the fields of `kind` in which something is to be checked."""
    found = []
    for info in msgspec.structs.fields(kind):
        rule = rule_of(info.type)
        if rule is not None and not rule.accepted and rule.cap is None:
            rule = None
        if rule is not None or any(_checked(nested) for nested in _structs_in(info.type)):
            found.append((info.encode_name, info.name, rule))
    return tuple(found)


def _check_cap(item: Any, path: str, name: str, caps: Caps) -> None:
    limit = getattr(caps, name)
    if name.endswith("_bytes"):
        size, what = _json_bytes(item, path, caps), "has {} bytes"
    elif isinstance(item, list | dict):
        size, what = len(item), "has {} entries"
    else:
        size, what = item if isinstance(item, int) else 0, "is {}"
    if size > limit:
        raise ApiError(f"{path} {what.format(size)}: this server's limit is {limit}", param=path)


def _json_bytes(value: Json, path: str, caps: Caps) -> int:
    """The size of free-form JSON. ApiError if it is nested too deeply: later steps recurse."""
    level, depth = [value], 0
    while level:
        if depth > caps.depth:
            raise ApiError(f"{path} is nested more than {caps.depth} levels deep", param=path)
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        depth += 1
    return len(msgspec.json.encode(value))


def _explain(message: str, body: bytes, kind: type[Struct]) -> ApiError:
    """What msgspec found, in terms of fields."""
    found = _PATH.fullmatch(message)
    problem, path = (found["problem"], found["path"]) if found else (message, "")
    fields = fields_of(kind)
    general = re.sub(r"\[[^\]]*\]", "[]", path)
    value = _value_at(body, path)
    if unknown := _UNKNOWN.fullmatch(problem):
        return _unknown(value if isinstance(value, dict) else {unknown[1]: None}, path, general, fields)
    if missing := _MISSING.fullmatch(problem):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return ApiError(f"{param} is missing: give it", param=param)
    rule = fields.rules.get(general)
    if rule is not None and rule.kind == "refused":
        return ApiError(f"{path} is not supported: {rule.about}; leave it out", param=path)
    problem = problem[:1].lower() + problem[1:]
    if isinstance(value, str) and problem.startswith("invalid"):
        if value in _REFUSED_VALUES:
            return _refused_value(path, value)
        problem = f"expected {_listed(fields.accepted.get(general, ()))}"
    where = f"{'a key of ' if found and found['key'] else ''}{path or 'the body'}"
    is_told = value is _NOTHING or value is None or isinstance(value, dict | list)
    got = "" if is_told else f", got {shown(value)}"
    return ApiError(f"{where}: {problem}{got}", param=path or None)


def _refused_value(path: str, value: str) -> ApiError:
    return ApiError(f"{path}={shown(value)} is not supported: {_REFUSED_VALUES[value]}", param=path)


def _unknown(value: dict[str, Json], path: str, general: str, fields: Fields) -> ApiError:
    prefix = f"{general}." if general else ""
    kind = value.get("type")
    if isinstance(kind, str) and kind in _REFUSED_VALUES and kind not in fields.accepted.get(f"{prefix}type", (kind,)):
        return _refused_value(f"{path}.type", kind)  # that has fields which nothing here has
    known = {name.removeprefix(prefix) for name in fields.rules if name.startswith(prefix)}
    names = [name for name in value if name not in known] or list(value)
    guesses = [guess for name in names[:10] for guess in difflib.get_close_matches(name[:80], known, 1)]
    hint = f": did you mean {', '.join(guesses)}?" if guesses else ""
    where = f" in {path}" if path else ""
    listed = ", ".join(shown(name) for name in names[:10])
    return ApiError(
        f"unknown field{'s' if len(names) > 1 else ''}{where}: {listed}{hint}",
        param=f"{path}.{names[0][:80]}" if path else names[0][:80],
    )


_NOTHING = object()


def _value_at(body: bytes, path: str) -> Json:
    """What the body has at msgspec's `path`, or _NOTHING where it does not say which item is meant."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):  # what comes after the first mistake may be no JSON at all
        return _NOTHING
    if "[...]" in path:
        return _NOTHING
    for index, name in _STEP.findall(path):
        try:
            value = value[int(index)] if index else value[name]
        except (LookupError, TypeError):
            return _NOTHING
    return value


def shown(value: Json) -> str:
    """`value` as JSON, cut to be part of a message."""
    try:
        text = msgspec.json.encode(value).decode()
    except (RecursionError, ValueError, TypeError):
        return "..."
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(shown(value) for value in values)


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types that a value annotated with `kind` may have."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif isinstance(kind, UnionType) or get_origin(kind) is Union:
        for part in get_args(kind):
            yield from _alternatives(part)
    else:
        yield kind


def _structs_in(kind: Any) -> Iterator[type[Struct]]:
    for part in _alternatives(kind):
        if get_origin(part) is list:
            yield from _structs_in(get_args(part)[0])
        elif isinstance(part, type) and issubclass(part, Struct):
            yield part
