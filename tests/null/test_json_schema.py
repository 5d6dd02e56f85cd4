"""The gate for JSON schemas: what compiles accepts nothing invalid, and the rest is refused by its pointer."""

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from grammar_helpers import accepts, compiled
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from random_schemas import random_schema, random_value

from strop.core.errors import RequestError
from strop.engine.grammar import Grammar

SUITE = json.loads((Path(__file__).parents[1] / "data" / "json-schema-suite" / "suite.json").read_text())

DRAFT_4, DRAFT_7 = (f"http://json-schema.org/draft-0{number}/schema#" for number in (4, 7))


def compiled_or_refused(schema: Any) -> tuple[Grammar | None, str]:
    try:
        return compiled(json=schema), ""
    except RequestError as error:
        return None, str(error)


def test_the_official_suite() -> None:
    """Every schema is refused, naming a place in it, or accepts no invalid instance."""
    num_refused = num_compiled = 0
    not_expressible = []
    for name, cases in SUITE.items():
        for case in cases:
            grammar, refusal = compiled_or_refused(case["schema"])
            if grammar is None:
                assert re.search(r"cannot be enforced at #(/|:)", refusal), (name, case["description"])
                num_refused += 1
                continue
            num_compiled += 1
            for what, instance, is_valid in case["tests"]:
                texts = [
                    json.dumps(instance, ensure_ascii=False, separators=form) for form in ((", ", ": "), (",", ":"))
                ]
                taken = [accepts(grammar, text) for text in texts]
                assert is_valid or not any(taken), f"{name}: {case['description']}: {what} was accepted"
                if is_valid and not all(taken):
                    not_expressible.append((name, what))
    assert (num_compiled, num_refused) == (193, 190)
    # Formats are enforced although they need not be; properties come in the schema's order; 1.0 is written 1.
    reasons = {"format": 10, "allOf": 2, "const": 4, "enum": 4, "type": 1, "unevaluatedProperties": 1}
    assert {name: sum(of == name for of, _ in not_expressible) for name in reasons} == reasons
    assert len(not_expressible) == sum(reasons.values()), not_expressible


def test_random_schemas_accept_nothing_invalid() -> None:
    rng = random.Random(0)
    num_accepted = num_compiled = 0
    for _ in range(160):
        schema = random_schema(rng)
        grammar, _ = compiled_or_refused(schema)
        if grammar is None:
            continue
        num_compiled += 1
        exact = json.loads(json.dumps(schema), parse_float=Decimal)
        validator = Draft202012Validator(exact, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for _ in range(15):
            text = json.dumps(random_value(rng), ensure_ascii=False)
            if accepts(grammar, text):
                num_accepted += 1
                assert validator.is_valid(json.loads(text, parse_float=Decimal)), (schema, text)
    assert num_compiled > 70
    assert num_accepted > 150


def test_bounds_are_exact() -> None:
    rng = random.Random(1)
    keywords = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
    numbers = [-10, -2, -1.5, -1, -0.25, -0.1, 0, 0.1, 0.5, 0.75, 1, 1.5, 2, 9, 9.99, 10, 99.5, 100, 1000]
    num_accepted = 0
    for _ in range(40):
        kind = rng.choice(["integer", "number"])
        bounds = {keyword: rng.choice(numbers) for keyword in rng.sample(keywords, rng.choice([1, 2, 2, 3]))}
        grammar, _ = compiled_or_refused({"type": kind, **bounds})
        if grammar is None:
            continue
        for number in [*numbers, *bounds.values()]:
            for shift in ("0", "0.01", "-0.01", "1", "-1", "0.5"):
                exact = Decimal(str(number)) + Decimal(shift)
                text = f"{exact:f}"
                if not accepts(grammar, text):
                    continue
                num_accepted += 1
                assert kind == "number" or exact == int(exact), (kind, bounds, text)
                assert exact >= Decimal(str(bounds.get("minimum", -1e9))), (kind, bounds, text)
                assert exact <= Decimal(str(bounds.get("maximum", 1e9))), (kind, bounds, text)
                assert exact > Decimal(str(bounds.get("exclusiveMinimum", -1e9))), (kind, bounds, text)
                assert exact < Decimal(str(bounds.get("exclusiveMaximum", 1e9))), (kind, bounds, text)
    assert num_accepted > 500


@pytest.mark.parametrize(
    ("schema", "pointer", "cause"),
    [
        ({"properties": {"a/b": {"items": {"not": {}}}}}, "#/properties/a~1b/items/not", "not is not supported"),
        ({"$defs": {"x": {"if": True}}, "anyOf": [{"$ref": "#/$defs/x"}]}, "#/$defs/x/if", "anyOf"),
        ({"minimun": 3}, "#/minimun", "not a keyword of draft 2020-12"),
        ({"nullable": True}, "#/nullable", "null"),
        ({"uniqueItems": True}, "#/uniqueItems", "check the answer"),
        ({"$ref": "https://example.com/x.json"}, "#/$ref", "must point into the schema"),
        ({"$ref": "#/$defs/x"}, "#/$ref", "leads nowhere"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "#/$schema", "draft 2020-12"),
        ({"max_length": 3}, "#/max_length", "not a keyword of draft 2020-12"),
        ({"items": {"id": "a"}}, "#/items/id", "$ref"),
        ({"minimum": 1, "exclusiveMinimum": True}, "#/exclusiveMinimum", "must be a number"),
        ({"anyOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, "#/unevaluatedProperties", "anyOf"),
        ({"items": {"$id": "a"}}, "#/items/$id", "$ref"),
        ({"items": [{}]}, "#/items", "a map, true or false"),
        ({"type": "float"}, "#/type", "integer, number"),
        ({"format": "iban"}, "#/format", "date-time"),
        ({"pattern": "a(?=b)"}, "#/pattern", "lookaround"),
        ({"pattern": "\\bword"}, "#/pattern", "position 0"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, "#", "exclude each other"),
        ({"allOf": [{"oneOf": [{"type": "integer"}, {"type": "number"}]}]}, "#/allOf/0", "use anyOf"),
        ({"maxItems": 10**9}, "#/maxItems", "at most 10000"),
        ({"minLength": -1}, "#/minLength", "0 or more"),
        ({"minProperties": 2}, "#/minProperties", "require more names"),
        ({"const": "a\0b"}, "#/const", "control characters"),
        ({"properties": {"a\x01": {}}, "patternProperties": {".": False}}, "#/properties/a\x01", "control characters"),
        ({"enum": [[2**60]]}, "#/enum/0/0", "too large"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, "#/exclusiveMinimum", "less than 1 away"),
        ({"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}]}, "#/allOf/1/multipleOf", "common multiple"),
        ({"multipleOf": 0}, "#/multipleOf", "above 0"),
        (
            {"properties": {"a": {"const": 1, "minimum": 2}}, "required": ["a"], "type": "object"},
            "#",
            "nothing satisfies",
        ),
        ({"properties": {"a": False, "b": {"enum": []}}}, "#/properties/b/enum", "at least one"),
        (False, "#", "accepts nothing"),
        ({"$ref": "#"}, "#", "nothing matches"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_pointer(schema: Any, pointer: str, cause: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"cannot be enforced at {pointer}: ")) as caught:
        compiled(json=schema)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"object"', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "[" * 10**5]
)
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json"):
        compiled(json=text)


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        ({"type": "object"}, ["{}", '{"a":1, "b": [null,true]}'], ["[]", "{ }", '{"a" :1}', '{"a":1,  "b":2}']),
        ({}, ["1", '"x"', "[]"], ["", "x", " 1"]),
        ({"type": "string", "maxLength": 2}, ['"é😀"', '"\\n\\""'], ['"abc"', '"\\u0041"', '"\n"']),
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, ['{"a":1}'], ['{"\\u0061":"x"}', '{"a":"x"}']),
        ({"$ref": "#/$defs/a%2Fb/~0"} | {"$defs": {"a/b": {"~": {"const": 1}}}}, ["1"], ["2"]),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"1900-02-29"', '"2024-13-01"']),
        ({"type": "string", "format": "time"}, ['"10:00:59Z"'], ['"10:00:60Z"', '"10:00:00"']),
        ({"type": "string", "format": "date", "pattern": "^2024", "allOf": [{"pattern": "1$"}]}, ['"2024-01-31"'],
         ['"2023-01-31"', '"2024-01-30"']),
        ({"type": "string", "pattern": "a.c"}, ['"xabcx"'], ['"a\\nc"', '"ac"']),
        # pydantic's discriminated unions
        ({"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
          "discriminator": {"propertyName": "kind"},
          "$defs": {kind: {"type": "object", "properties": {"kind": {"const": kind, "type": "string"}},
                           "required": ["kind"], "additionalProperties": False} for kind in ("Cat", "Dog")}},
         ['{"kind":"Cat"}', '{"kind": "Dog"}'], ['{"kind":"Cow"}']),
        # a tree
        ({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"],
          "additionalProperties": False}, ['{"next":{"next":null}}'], ['{"next":{}}']),
        ({"type": "number", "x-note": 1, "title": "t", "uniqueItems": False}, ["1e5", "-0.5"], ["01", "+1"]),
    ],
)  # fmt: skip
def test_what_is_enforced(schema: Any, accepted: list[str], refused: list[str]) -> None:
    grammar = compiled(json=schema)
    for text in accepted:
        assert accepts(grammar, text), text
    for text in refused:
        assert not accepts(grammar, text), text


@pytest.mark.parametrize(
    ("dialect", "schema", "valid", "invalid"),
    [
        (DRAFT_4, {"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "4", "3"),
        (DRAFT_4, {"type": "integer", "minimum": 3, "exclusiveMinimum": False, "id": "a"}, "3", "2"),
        (DRAFT_7, {"items": [{"type": "null"}], "additionalItems": False}, "[null]", "[null, null]"),
        (DRAFT_7, {"items": [{"type": "null"}], "additionalItems": {"const": 1}}, "[null, 1]", "[null, 2]"),
        (DRAFT_7, {"items": {"const": 1}, "additionalItems": False}, "[1, 1]", "[1, 2]"),
        ("https://json-schema.org/draft/2019-09/schema", {"items": [{"type": "null"}]}, "[null, 7]", "[7]"),
    ],
)
def test_older_drafts_mean_what_they_meant(dialect: str, schema: Any, valid: str, invalid: str) -> None:
    schema = {"$schema": dialect, **schema}
    Validator = validator_for(schema)
    assert Validator(schema).is_valid(json.loads(valid)) and not Validator(schema).is_valid(json.loads(invalid))
    grammar = compiled(json=schema)
    assert accepts(grammar, valid) and not accepts(grammar, invalid)


@pytest.mark.parametrize("note", ["x-order", "jupyter.lab.menus", "meta:enum", "$$description", "markdownDescription"])
def test_notes_of_tools_say_nothing(note: str) -> None:
    assert accepts(compiled(json={"type": "null", note: {"not": {}}}), "null")


@pytest.mark.parametrize("keyword", ["unevaluatedProperties", "additionalProperties"])
def test_what_a_draft_ignores_tells_no_choices_apart(keyword: str) -> None:
    """By draft-07 an object with both names satisfies both schemas, unless additionalProperties says otherwise."""
    choices = [{"type": "object", "properties": {name: {}}, "required": [name], keyword: False} for name in "ab"]
    schema = {"$schema": DRAFT_7, "oneOf": choices}
    grammar, refusal = compiled_or_refused(schema)
    if keyword == "additionalProperties":
        assert grammar is not None and accepts(grammar, '{"a": 1}') and not accepts(grammar, '{"a": 1, "b": 1}')
    else:
        assert "at #/oneOf/0/unevaluatedProperties: unevaluatedProperties is ignored by draft-07" in refusal
    assert accepts(compiled(json={"oneOf": choices}), '{"b": 1}')
