"""Strangers' wishes: each gets its verdict within the time limit, and only the helper process can suffer."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from grammar_helpers import VOCAB_SIZE, tokenizer

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar_check import GrammarChecker

TIMEOUT_S = 20.0  # of a machine that others use, too; what takes longer is killed


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(tokenizer(), VOCAB_SIZE, timeout_s=TIMEOUT_S)
    checker.check(StructuredOutputsParams(json_object=True))
    yield checker
    checker.close()


def nested(schema: Any, num_levels: int) -> Any:
    for _ in range(num_levels):
        schema = {"type": "array", "items": schema}
    return schema


def optional(num_names: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(num_names)}}


def doubling(num_levels: int) -> dict[str, Any]:
    return {f"{i}": {"oneOf": 2 * [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(num_levels)} | {f"{num_levels}": {}}


def ambiguous(num_rules: int) -> str:
    rules = "".join(f'\nx{i}: y{i} "z"\ny{i}: ("a" | "b")+' for i in range(num_rules))
    return f"start: {' | '.join(f'x{i}' for i in range(num_rules))}{rules}"


HOSTILE: dict[str, dict[str, Any]] = {
    "a regex of many expressions": {"regex": "(x+x+){2000}{2000}y"},
    "repeats of repeats": {"regex": "((((((a{1,999}){1,999}){1,999}){1,999}){1,999}){1,999}){1,999}b{9,99999}"},
    "groups in groups": {"regex": "(" * 50_000 + ")" * 50_000},
    "a class without end": {"regex": "[" * 100_000},
    "brackets": {"json": "[" * 200_000},
    "maps in maps": {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "schemas in schemas": {"json": nested({}, 100)},
    "a constant in depth": {"json": '{"const":' + "[" * 400 + "]" * 400 + "}"},
    "huge counts": {"json": {"type": "array", "minItems": 10**12}},
    "counts of counts": {"json": {"type": "array", "minItems": 10_000, "items": nested({}, 3) | {"minItems": 10**9}}},
    "too much text": {"json": {"enum": [f"word {i}" for i in range(40_000)]}},
    "names that may all be missing": {"json": optional(4000)},
    "every combination": {
        "json": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}
    },
    "a reference to itself": {"json": {"$ref": "#"}},
    "references in a circle": {
        "json": {"$defs": {a: {"$ref": f"#/$defs/{b}"} for a, b in ("ab", "ba")}, "$ref": "#/$defs/a"}
    },
    "a circle with company": {"json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}},
    "oneOf that doubles": {"json": {"$ref": "#/$defs/0", "$defs": doubling(49)}},
    "oneOf of itself": {"json": {"oneOf": [{"$ref": "#"}, {"type": "string"}]}},
    "patterns of no known overlap": {
        "json": {"patternProperties": {f"^(a|b)*{c}.*{c}.*{c}.{{9,99}}$": {} for c in "abcdefgh"}}
    },
    "a pattern of unknown length": {"json": {"type": "string", "pattern": "^(a|ab)*c.*d.*e{3,500}$", "minLength": 999}},
    "Lark that is too much after a token": {"grammar": ambiguous(900)},
    "no Lark": {"grammar": "start: ((("},
    "Lark in depth": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "Lark without words": {"grammar": "start: start"},
    "a token that none has": {"grammar": "start: <|nothing|>"},
    "a lone surrogate": {"choice": ["\ud800"]},
}  # fmt: skip


@pytest.mark.parametrize("wanted", HOSTILE.values(), ids=HOSTILE)
def test_hostile_wishes_are_refused_in_time(checker: GrammarChecker, wanted: dict[str, Any]) -> None:
    begin_s = time.monotonic()
    with pytest.raises(RequestError) as caught:
        checker.check(StructuredOutputsParams(**wanted))
    assert time.monotonic() - begin_s < TIMEOUT_S + 10
    assert (
        "structured_outputs" in str(caught.value)
        or "cannot be enforced at #" in str(caught.value)
        or "regular" in str(caught.value)
    )
    assert len(str(caught.value)) < 800


def test_large_wishes_pass(checker: GrammarChecker) -> None:
    properties = {f"field_{i}": {"type": ["string", "null"], "description": "x" * 200} for i in range(200)}
    for wanted in (
        {
            "json": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        },
        {"json": {"type": "string", "maxLength": 100_000}},
        {"choice": [f"word {i}" for i in range(2000)]},
        {"json": nested({"type": "integer"}, 40)},
        {"regex": "[^]{0,5000}"},
    ):
        checker.check(StructuredOutputsParams(**wanted))


def test_what_takes_too_long_is_killed_and_the_next_is_served() -> None:
    checker = GrammarChecker(tokenizer(), timeout_s=0.05)
    slow = StructuredOutputsParams(json=optional(4000))
    good = StructuredOutputsParams(choice=("a", "b"))
    checker.check(good)
    assert checker._helper is not None
    process = checker._helper._process
    with pytest.raises(RequestError, match=r"took longer than 0.05 s"):
        checker.check(slow)
    assert process.poll() is not None
    begin_s = time.monotonic()
    with pytest.raises(RequestError, match=r"took longer"):
        checker.check(slow)  # known by now: nothing is started
    assert time.monotonic() - begin_s < 0.04
    checker.check(good)
    assert checker._helper is None
    checker.timeout_s = TIMEOUT_S
    checker.check(StructuredOutputsParams(choice=("c",)))
    checker.close()


def test_what_would_hold_the_engine_up_is_refused() -> None:
    checker = GrammarChecker(tokenizer(), timeout_s=TIMEOUT_S, compile_s=0.0)
    with pytest.raises(RequestError, match="of the processor, more than 0 s, to compile"):
        checker.check(StructuredOutputsParams(json_object=True))
    checker.close()


def test_a_helper_that_died_costs_one_verdict_at_most(checker: GrammarChecker) -> None:
    assert checker._helper is not None
    checker._helper._process.kill()
    checker._helper._process.wait()
    checker.check(StructuredOutputsParams(choice=("after", "the end")))


def test_memory_is_the_helpers_own_and_bounded(checker: GrammarChecker) -> None:
    checker.check(StructuredOutputsParams(choice=("d",)))
    assert checker._helper is not None
    path = f"/proc/{checker._helper._process.pid}/limits"
    if not os.path.exists(path):
        pytest.skip("no /proc here")
    with open(path) as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max address space"] == str(checker.memory_bytes)
    assert limits["Max open files"] == "3"


def test_verdicts_name_the_place(checker: GrammarChecker) -> None:
    schema = json.dumps({"properties": {"a": {"type": "object", "properties": {"b": {"uniqueItems": True}}}}})
    with pytest.raises(RequestError, match="#/properties/a/properties/b/uniqueItems"):
        checker.check(StructuredOutputsParams(json=schema))
