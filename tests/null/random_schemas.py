"""Random JSON schemas out of what the gate enforces, and random values that have a chance to satisfy them."""

import random
from collections.abc import Callable
from typing import Any

NAMES = ["a", "b", "c", "ab", "x/y", "é"]
# Mean the same to ECMA-262 and to Python's re, which the validator uses.
PATTERNS = ["^a", "b$", "^[0-9]+$", "a.c", "(ab|ba)+", "^(a|b)*$", "[^a]", "^.{2,3}$", "^a$|^b$", "é"]
TEXTS = ["", "a", "b", "ab", "ba", "abc", "x", "é", "12", 'a"b', "a\\c", "a\nc", "abab", "2020-02-29", "10:00:00Z"]
NUMBERS = [0, 1, -1, 2, 3, 5, 10, -7, 0.5, 1.5, -2.25, 0.1, 100, 99, -0.5, 12.75, 0.001]
TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.3 or depth > 2:
        return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(-120, 120)
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.68:
        return rng.choice([True, False, None])
    if kind < 0.83:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(NAMES): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def random_schema(rng: random.Random) -> dict[str, Any]:
    schema: Any = True
    while not isinstance(schema, dict):
        schema = _schema(rng, 0)
    return schema | {"$defs": {name: _schema(rng, 1) for name in ("p", "q")}}


def _schema(rng: random.Random, depth: int) -> Any:
    if depth > 3 or rng.random() < 0.08:
        return rng.choice([True, {}, {"type": "string"}, {"type": "integer"}, {"type": "null"}, False])
    schema: dict[str, Any] = {}
    if rng.random() < 0.65:
        schema["type"] = rng.choice([*TYPES, "object", "string", ["string", "integer"], ["object", "null", "array"]])
    keywords = rng.sample(list(_KEYWORDS), rng.choice([0, 1, 1, 2, 2, 3, 4]))
    schema |= {keyword: _KEYWORDS[keyword](rng, depth + 1) for keyword in keywords}
    items = list(schema.items())
    rng.shuffle(items)
    return dict(items)


def _some(rng: random.Random, depth: int) -> list[Any]:
    return [_schema(rng, depth) for _ in range(rng.randint(1, 3))]


def _by_name(names: list[str]) -> Callable[[random.Random, int], Any]:
    return lambda rng, depth: {name: _schema(rng, depth) for name in rng.sample(names, rng.randint(1, 2))}


_KEYWORDS: dict[str, Callable[[random.Random, int], Any]] = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), lambda rng, _: rng.choice(NUMBERS)),
    "multipleOf": lambda rng, _: rng.choice([2, 3, 0.5, 0.1, 5, 0.25, 10]),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), lambda rng, _: rng.randint(0, 3)),
    "pattern": lambda rng, _: rng.choice(PATTERNS),
    "format": lambda rng, _: rng.choice(["date", "ipv4", "email"]),
    "items": _schema,
    "prefixItems": _some,
    "properties": _by_name(NAMES),
    "patternProperties": _by_name(PATTERNS),
    "additionalProperties": _schema,
    "required": lambda rng, _: rng.sample(NAMES, rng.randint(0, 2)),
    "minProperties": lambda rng, _: rng.randint(0, 2),
    "maxProperties": lambda rng, _: rng.randint(0, 3),
    "enum": lambda rng, _: [random_value(rng) for _ in range(rng.randint(1, 4))],
    "const": lambda rng, _: random_value(rng),
    **dict.fromkeys(("anyOf", "allOf", "oneOf"), _some),
    "$ref": lambda rng, _: rng.choice(["#/$defs/p", "#/$defs/q"]),
}
