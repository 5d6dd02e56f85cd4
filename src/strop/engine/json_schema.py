"""JSON schemas for structured output: each keyword is enforced, to the letter, or refused by its JSON pointer.

llguidance compiles schemas, but ignores keywords that it does not know, and weakens some combinations of those it does.
`enforceable` rewrites a schema so that only what it enforces reaches it. Draft 2020-12; `$schema` may name a draft from
4 on, whose keywords mean the same here, are translated, or are refused.
"""

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from math import ceil, floor, lcm
from typing import Any
from urllib.parse import unquote

import msgspec

from strop.core.errors import RequestError
from strop.engine.ecma_regex import is_spelled, rust_regex
from strop.engine.json_schema_dialect import dialect_of, ignored, translated

MAX_DEPTH = 50
"""Of schemas inside schemas; llguidance's own parser allows 128 levels of JSON."""
MAX_SCHEMAS = 20_000
"""Each place a $ref leads to counts once, and in oneOf every time."""
MAX_ITEMS = 10_000
"""minItems and maxItems: each item is a symbol of the grammar."""
MAX_LENGTH = 2**31 - 1
MAX_EXACT = 2**53 - 1
"""Integers up to here, and their neighbours, are exact in float64, which is what bounds are compared in."""

MAX_DECIMALS = 15

WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""One space after a comma or a colon, or none: a model cannot go on writing whitespace for ever."""
# Without \u escapes each string has one spelling, and no name can be written a second time in another one.
ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}

Schema = dict[str, Any] | bool

_ANNOTATIONS = frozenset(
    {"$comment", "$defs", "definitions", "$anchor", "$dynamicAnchor", "title", "description", "default", "examples"}
    | {"example", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"}
    | {"discriminator"}
    # Of editors and of generators of types and forms, as published schemas have them.
    | {"markdownDescription", "enumDescriptions", "markdownEnumDescriptions", "enumNames", "tsEnumNames", "tsType"}
    | {"deprecationMessage", "errorMessage", "patternErrorMessage", "defaultSnippets", "doNotSuggest"}
    | {"suggestSortText", "allowComments", "allowTrailingCommas", "fileMatch"}
)
_NOTE = re.compile(r"x-|\$\$|.*[.:]")
"""How a keyword begins that no draft could have: a tool's own note."""
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}
_NOT_ENFORCED = {
    "not": "say what is accepted instead",
    "if": "use anyOf with one schema for each case",
    "then": "use anyOf with one schema for each case",
    "else": "use anyOf with one schema for each case",
    "contains": "constrain all items with items, or some by position with prefixItems",
    "minContains": "constrain all items with items",
    "maxContains": "constrain all items with items",
    "uniqueItems": "leave it out and check the answer",
    "propertyNames": "use patternProperties with additionalProperties false",
    "dependentRequired": "use anyOf with one schema for each case",
    "dependentSchemas": "use anyOf with one schema for each case",
    "unevaluatedItems": "use items",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "$vocabulary": "leave it out",
    "additionalItems": "use prefixItems with items, as draft 2020-12 does",
    "dependencies": "use anyOf with one schema for each case",
    "nullable": 'use "type": [..., "null"]',
}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LEAP_YEAR = r"(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    r"(\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
# llguidance's own let February have 29 days in any year and every minute 61 seconds.
_FORMATS: dict[str, dict[str, Any]] = {
    "date": {"pattern": rust_regex(f"^{_DATE}$")},
    "time": {"pattern": rust_regex(f"^{_TIME}$")},
    "date-time": {"pattern": rust_regex(f"^{_DATE}[tT]{_TIME}$")},
    "hostname": {"format": "hostname", "maxLength": 253},
    "email": {"format": "email", "maxLength": 254},
    **{name: {"format": name} for name in ("duration", "ipv4", "ipv6", "uuid", "uri")},
}


def parse_schema(text: str) -> Schema:
    """The schema in JSON `text`. RequestError if it is not JSON, or neither a map nor true or false."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is not JSON: {error}; give a JSON schema") from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"structured_outputs.json is a {type(schema).__name__}: give a JSON schema, which is a map")
    return schema


def enforceable(document: Schema, pointer: str = "#") -> dict[str, Any]:
    """The schema at `pointer` of `document`, for llguidance, which then accepts nothing that the schema does not.

    Raises RequestError with the JSON pointer of the first keyword that cannot be enforced.
    """
    gate = _Gate(document)
    root = gate.schema(resolve(document, pointer, pointer), pointer, 0)
    if root is False:
        raise _refusal(pointer, "the schema false accepts nothing")
    definitions = gate.definitions()
    gate.check_numbers()
    gate.check_choices()
    return {**({} if root is True else root), "$defs": definitions, "x-guidance": {**WHITESPACE, **ESCAPES}}


def inner_pointers(document: Schema, pointer: str) -> Iterator[str]:
    """Pointers of the schemas directly inside the one at `pointer`."""
    schema = resolve(document, pointer, pointer)
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        at = f"{pointer}/{_escaped(keyword)}"
        if keyword in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            yield from (f"{at}/{_escaped(name)}" for name in value)
        elif keyword in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            yield from (f"{at}/{i}" for i in range(len(value)))
        elif keyword in ("items", "additionalProperties"):
            yield at


def resolve(document: Any, pointer: str, at: str) -> Any:
    """What `pointer` (a fragment, "#" or "#/...") leads to. RequestError, at `at`, if nothing."""
    found = document
    for step in pointer.removeprefix("#").split("/")[1:]:
        name = _unescaped(step)
        if isinstance(found, list) and name.isdecimal() and int(name[:10]) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise _refusal(at, f"{pointer!r:.100} leads nowhere; a $ref must point into the schema")
    return found


class _Gate:
    """Rewrites schemas of one document. What a $ref points to becomes a definition of its own, with a plain name."""

    def __init__(self, document: Schema) -> None:
        self._document = document
        self._dialect = dialect_of(document.get("$schema")) if isinstance(document, dict) else None
        self._num_schemas = 0
        self._names: dict[str, str] = {}
        self._pending: list[str] = []
        self._bounds: list[tuple[str, float, str]] = []
        """Keyword, value and pointer."""
        self._multiples: list[tuple[Decimal, str]] = []
        self._ignored: list[str] = []
        """Pointers of what the schema's draft would ignore. It is enforced all the same."""
        self._has_choices = False

    def definitions(self) -> dict[str, Any]:
        """Of all that was referred to; those may refer to more."""
        defined = {}
        while self._pending:
            pointer = self._pending.pop()
            defined[self._names[pointer]] = self.schema(resolve(self._document, pointer, pointer), pointer, 0)
        return defined

    def check_numbers(self) -> None:
        """Refuses numbers that llguidance would join wrongly if some allOf brought them together."""
        # It takes the 1 in "above 1, at most 1.5" for allowed, and the 2 in "below 2, at least 1.5".
        fractions = [(keyword[-7:], bound) for keyword, bound, _ in self._bounds if bound != int(bound)]
        taken = {("exclusiveMinimum", floor(bound)) for end, bound in fractions if end.lower() == "maximum"}
        taken |= {("exclusiveMaximum", ceil(bound)) for end, bound in fractions if end.lower() == "minimum"}
        for keyword, bound, at in self._bounds:
            if (keyword, bound) in taken:
                raise _refusal(
                    at, f"{keyword}={bound} with another bound less than 1 away is not supported: move it a little"
                )
        # Its least common multiples are computed in 32 bits, and an overflow goes unnoticed.
        if self._multiples:
            scale = 10 ** max(_num_decimals(number) for number, _ in self._multiples)
            scaled = [int(number * scale) for number, _ in self._multiples]
            if lcm(*scaled) * max(scaled) >= 2**32 and len(set(scaled)) > 1:
                at = self._multiples[-1][1]
                raise _refusal(at, "multipleOf is not supported with others whose common multiple is as large as here")

    def check_choices(self) -> None:
        """Refuses what would let llguidance think that the schemas of a oneOf exclude each other."""
        if self._has_choices and self._ignored:
            at = self._ignored[0]
            raise _refusal(
                at,
                f"{_keyword(at)} is ignored by {self._dialect}, which matters to oneOf: set $schema to draft 2020-12",
            )

    def schema(self, schema: Any, at: str, depth: int) -> Schema:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _refusal(at, f"a schema must be a map, true or false, not {_shown(schema)}")
        self._num_schemas += 1
        if depth > MAX_DEPTH or self._num_schemas > MAX_SCHEMAS:
            raise _refusal(at, f"there are more than {MAX_SCHEMAS} schemas, or more than {MAX_DEPTH} inside each other")
        enforced: dict[str, Any] = {}
        schema = translated(schema, self._dialect)
        self._ignored += (f"{at}/{keyword}" for keyword in ignored(schema, self._dialect) if keyword in _ENFORCED)
        for keyword, value in schema.items():
            here = f"{at}/{_escaped(keyword)}"
            if keyword in _ENFORCED:
                made = _ENFORCED[keyword](self, value, here, depth + 1)
                if "allOf" in made:  # a format is one, too
                    made["allOf"] = enforced.get("allOf", []) + made["allOf"]
                enforced |= made
            elif keyword not in _ANNOTATIONS and not _NOTE.match(keyword):
                self._check_ignored(keyword, value, here)
        _check_together(schema, at)
        return enforced

    def _check_ignored(self, keyword: str, value: Any, at: str) -> None:
        """Refuses a keyword that would be ignored, unless that makes no difference."""
        if value in _NO_EFFECT.get(keyword, ()) and type(value) in map(type, _NO_EFFECT[keyword]):
            return
        if keyword in _NOT_ENFORCED:
            raise _refusal(at, f"{keyword} is not supported: {_NOT_ENFORCED[keyword]}")
        if keyword == "$schema":
            if dialect_of(value) is None:
                raise _refusal(at, f"{_shown(value)} is not supported: write for draft 2020-12")
        elif keyword in ("$id", "id"):
            if at not in ("#/$id", "#/id"):
                raise _refusal(at, f"{keyword} inside a schema is not supported: use $ref with a path, as in #/$defs/x")
        else:
            raise _refusal(
                at,
                f"{keyword!r} is not a keyword of draft 2020-12: leave it out, or let the name of a note begin with x-",
            )

    def _map(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """Of schemas."""
        if not isinstance(value, dict):
            raise _refusal(at, f"must be a map of schemas, not {_shown(value)}")
        return {name: self.schema(schema, f"{at}/{_escaped(name)}", depth) for name, schema in value.items()}

    def _list(self, value: Any, at: str, depth: int) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise _refusal(at, f"must be a list of schemas, at least one, not {_shown(value)}")
        return [self.schema(schema, f"{at}/{i}", depth) for i, schema in enumerate(value)]

    def enforce_schema(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """additionalProperties, items."""
        return {_keyword(at): self.schema(value, at, depth)}

    def enforce_list(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """allOf, anyOf, prefixItems."""
        return {_keyword(at): self._list(value, at, depth)}

    def enforce_one_of(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """llguidance tells whether schemas exclude each other, but does not look behind a $ref."""
        self._has_choices = True
        schemas = self._list(value, at, depth)
        for i, schema in enumerate(value):
            alone = schemas[i]
            if isinstance(schema, dict) and isinstance(alone, dict) and alone.keys() == {"$ref"}:
                pointer = self._pointer(schema["$ref"], f"{at}/{i}/$ref")
                schemas[i] = self.schema(resolve(self._document, pointer, at), pointer, depth)
        return {"oneOf": schemas}

    def enforce_unevaluated(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """unevaluatedProperties, where properties, allOf and $ref say which those are, whatever the value is."""
        schema = resolve(self._document, at[: at.rindex("/")], at)
        inner = {keyword: inner for keyword, inner in schema.items() if keyword != "unevaluatedProperties"}
        evaluated = self._evaluated(inner, at, set())
        rest = self.schema(value, at, depth)
        if evaluated is None or rest in (True, {}):
            return {}
        names = {"properties": {name: True for keyword, name in evaluated if keyword == "properties"}}
        patterns = {_pattern(name, at): True for keyword, name in evaluated if keyword == "patternProperties"}
        return {"allOf": [{**names, "patternProperties": patterns, "additionalProperties": rest}]}

    def _evaluated(self, schema: Any, at: str, seen: set[str]) -> dict[tuple[str, str], None] | None:
        """properties and patternProperties that a schema speaks of, in order; None if of all."""
        if not isinstance(schema, dict):
            return {}
        if "additionalProperties" in schema or "unevaluatedProperties" in schema:
            return None
        found = {
            (keyword, name): None for keyword in ("properties", "patternProperties") for name in schema.get(keyword, ())
        }
        inner = list(schema.get("allOf", ()))
        if "$ref" in schema:
            pointer = self._pointer(schema["$ref"], at)
            if pointer not in seen:
                seen.add(pointer)
                inner.append(resolve(self._document, pointer, at))
        for more in (self._evaluated(one, at, seen) for one in inner):
            if more is None:
                return None
            found |= more
        for choice in (one for keyword in ("anyOf", "oneOf") for one in schema.get(keyword, ())):
            if self._evaluated(choice, at, seen) != {}:
                why = "with properties in anyOf or oneOf is not supported: use additionalProperties there"
                raise _refusal(at, f"unevaluatedProperties {why}")
        return found

    def enforce_properties(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        schemas = self._map(value, at, depth)
        for name in schemas:
            _check_text(name, f"{at}/{_escaped(name)}")
        return {"properties": schemas}

    def enforce_patterns(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        schemas = self._map(value, at, depth)
        patterns = {pattern: _pattern(pattern, f"{at}/{_escaped(pattern)}") for pattern in schemas}
        if len(set(patterns.values())) < len(patterns):
            raise _refusal(at, "two patterns say the same: join their schemas with allOf")
        return {"patternProperties": {patterns[pattern]: schema for pattern, schema in schemas.items()}}

    def _pointer(self, reference: Any, at: str) -> str:
        """What a $ref says, in one spelling. RequestError if it leads out of the document, or nowhere."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise _refusal(
                at, f"{_shown(reference)} is not supported: a $ref must point into the schema, as in #/$defs/x"
            )
        pointer = "#" + "".join(f"/{_escaped(_unescaped(unquote(step)))}" for step in reference.split("/")[1:])
        resolve(self._document, pointer, at)
        return pointer

    def enforce_ref(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        pointer = self._pointer(value, at)
        if pointer not in self._names:
            self._names[pointer] = str(len(self._names))
            self._pending.append(pointer)
        return {"$ref": f"#/$defs/{self._names[pointer]}"}

    def enforce_type(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        types = value if isinstance(value, list) else [value]
        if not types or any(name not in _TYPES for name in types):
            raise _refusal(at, f"{_shown(value)} is not a type: give one of {', '.join(_TYPES)}, or a list of them")
        return {"type": value}

    def enforce_values(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """const, enum."""
        if _keyword(at) == "enum" and (not isinstance(value, list) or not value):
            raise _refusal(at, f"must be a list of values, at least one, not {_shown(value)}")
        _check_value(value, at)
        return {_keyword(at): value}

    def enforce_required(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise _refusal(at, f"must be a list of names, not {_shown(value)}")
        for i, name in enumerate(value):
            _check_text(name, f"{at}/{i}")
        return {"required": value}

    def enforce_count(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """minLength, maxItems and their like."""
        keyword = _keyword(at)
        most = MAX_LENGTH if keyword.endswith("Length") else MAX_ITEMS
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise _refusal(at, f"{keyword}={_shown(value)} must be an integer, 0 or more")
        if value > most:
            raise _refusal(at, f"{keyword}={_shown(value)} is too large: at most {most}")
        return {keyword: int(value)}

    def enforce_bound(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        """minimum, exclusiveMaximum and their like."""
        _check_number(value, at)
        self._bounds.append((_keyword(at), value, at))
        return {_keyword(at): value}

    def enforce_multiple(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        _check_number(value, at)
        exact = Decimal(repr(value))
        if exact <= 0:
            raise _refusal(at, f"multipleOf={value} must be above 0")
        if not _survives_scaling(value):
            raise _refusal(at, f"multipleOf={value} has too many digits: give at most nine, such as 0.01")
        self._multiples.append((exact, at))
        return {"multipleOf": value}

    def enforce_pattern(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        return {"pattern": _pattern(value, at)}

    def enforce_format(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, str) or value not in _FORMATS:
            raise _refusal(at, f"format={_shown(value)} is not supported: use pattern, or one of {', '.join(_FORMATS)}")
        return {"allOf": [_FORMATS[value]]}


Enforce = Callable[[_Gate, Any, str, int], dict[str, Any]]

_ENFORCED: dict[str, Enforce] = {
    "$ref": _Gate.enforce_ref,
    "type": _Gate.enforce_type,
    "enum": _Gate.enforce_values,
    "const": _Gate.enforce_values,
    "required": _Gate.enforce_required,
    "properties": _Gate.enforce_properties,
    "patternProperties": _Gate.enforce_patterns,
    "multipleOf": _Gate.enforce_multiple,
    "pattern": _Gate.enforce_pattern,
    "format": _Gate.enforce_format,
    **dict.fromkeys(("additionalProperties", "items"), _Gate.enforce_schema),
    "unevaluatedProperties": _Gate.enforce_unevaluated,
    "oneOf": _Gate.enforce_one_of,
    **dict.fromkeys(("allOf", "anyOf", "prefixItems"), _Gate.enforce_list),
    **dict.fromkeys((f"{end}{of}" for end in ("min", "max") for of in ("Length", "Items")), _Gate.enforce_count),
    **dict.fromkeys(("minProperties", "maxProperties"), _Gate.enforce_count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _Gate.enforce_bound),
}


def _check_together(schema: dict[str, Any], at: str) -> None:
    """What no keyword shows alone."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if least > len(set(required)) + 1:
        raise _refusal(
            f"{at}/minProperties",
            f"minProperties={least} with {len(set(required))} required names is not supported, since a name could come"
            " twice: require more names",
        )


def _check_value(value: Any, at: str) -> None:
    """Refuses a value, of const or enum, that would be written inexactly or not at all."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_text(name, f"{at}/{_escaped(name)}")
            _check_value(item, f"{at}/{_escaped(name)}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_value(item, f"{at}/{i}")
    elif isinstance(value, str):
        _check_text(value, at)
    elif value is not None and not isinstance(value, bool):
        _check_number(value, at)


def _check_text(text: str, at: str) -> None:
    """Refuses what llguidance would write without its control characters, or not compare with patterns."""
    if not is_spelled(text):
        raise _refusal(at, f"{_shown(text)} has control characters other than \\b \\t \\n \\f \\r: leave them out")


def _check_number(value: Any, at: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(at, f"must be a number, not {_shown(value)}")
    if abs(value) > MAX_EXACT:
        raise _refusal(at, f"{_shown(value)} is too large to be compared exactly: give at most 2^53 - 1 = {MAX_EXACT}")
    if isinstance(value, float) and _num_decimals(Decimal(repr(value))) > MAX_DECIMALS:
        raise _refusal(at, f"{_shown(value)} has more than {MAX_DECIMALS} decimals: round it")


def _survives_scaling(value: float) -> bool:
    """Whether llguidance, which multiplies by ten until nothing is left after the point, reads it exactly."""
    scaled, num_decimals = float(value), 0
    while scaled != int(scaled):
        scaled, num_decimals = scaled * 10, num_decimals + 1
    return scaled < 2**32 and Decimal(int(scaled)).scaleb(-num_decimals) == Decimal(repr(value))


def _num_decimals(number: Decimal) -> int:
    exponent = number.normalize().as_tuple().exponent
    return max(0, -int(exponent))


def _pattern(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _refusal(at, f"must be a regular expression, not {_shown(value)}")
    try:
        return rust_regex(value, in_json_string=True)
    except RequestError as error:
        raise _refusal(at, str(error)) from None


def _refusal(at: str, why: str) -> RequestError:
    return RequestError(f"the JSON schema cannot be enforced at {at}: {why}")


def _keyword(at: str) -> str:
    return at[at.rindex("/") + 1 :]


def _escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _unescaped(step: str) -> str:
    return step.replace("~1", "/").replace("~0", "~")


def _shown(value: object) -> str:
    return f"{value!r:.60}"
