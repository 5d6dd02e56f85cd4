"""Answers under a grammar end within their tokens, however the model goes on and on."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from grammar_helpers import END_ID, allowed_ids, compiled, tokenizer
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from random_schemas import random_schema

from strop.core.errors import RequestError
from strop.core.request import SamplingParams
from strop.engine.ending import Quotes
from strop.engine.grammar import Grammar
from strop.engine.sample import SampleRow

PERSON = {
    "type": "object",
    "properties": {
        "note": {"type": "object", "required": ["a", "b"]},
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 3}},
        "kind": {"enum": ["alpha", "beta"]},
        "age": {"type": "integer", "minimum": 20},
        "when": {"type": "string", "format": "date"},
        "child": {"$ref": "#"},
    },
    "required": ["name", "kind", "age", "when"],
    "additionalProperties": False,
}


def new_row(grammar: Grammar, token_ids: list[int], max_tokens: int, **changes: Any) -> SampleRow:
    params = SamplingParams(max_tokens=max_tokens, **changes)
    return SampleRow(
        params, 0, token_ids, 0, finish_token_ids=(END_ID,), matcher=grammar.matcher(), max_tokens=max_tokens
    )


def written(grammar: Grammar, rng: random.Random, max_tokens: int) -> tuple[list[int], bool]:
    """An answer by a model that would rather not close anything, and whether it may end there."""
    token_ids: list[int] = []
    row = new_row(grammar, token_ids, max_tokens)
    assert row.matcher is not None
    while len(token_ids) < max_tokens:
        allowed = sorted(allowed_ids(row.matcher))
        assert allowed
        going_on = [token_id for token_id in allowed if token_id not in closing_ids()]
        token_ids.append(row.advance(rng.choice(going_on or allowed)))
        if token_ids[-1] == END_ID or row.matcher.is_complete:
            return token_ids, True
    return token_ids, END_ID in allowed_ids(row.matcher)


@cache
def closing_ids() -> set[int]:
    texts = {token_id: text_of([token_id]) for token_id in range(tokenizer().vocab_size)}
    return {token_id for token_id, text in texts.items() if text[:1] in ('"', "}", "]", "")}


def text_of(token_ids: list[int]) -> str:
    return tokenizer().decode([token_id for token_id in token_ids if token_id != END_ID])


@pytest.mark.parametrize("max_tokens", [100, 101, 150, 400])
def test_an_endless_answer_is_led_to_its_end(max_tokens: int) -> None:
    lens = set()
    for seed in range(8):
        token_ids, is_complete = written(compiled(json=PERSON), random.Random(seed), max_tokens)
        assert is_complete
        Draft202012Validator(PERSON).validate(json.loads(text_of(token_ids)))
        lens.add(len(token_ids))
    assert max(lens) >= max_tokens - 1, "the model was to go on as long as it could"


def test_random_schemas_end_in_time_and_match() -> None:
    rng = random.Random(0)
    num_answers = num_complete = 0
    for _ in range(120):
        schema = random_schema(rng)
        try:
            grammar = compiled(json=schema)
        except RequestError:
            continue
        token_ids, is_complete = written(grammar, rng, 250)
        num_answers += 1
        num_complete += is_complete
        if is_complete:
            Draft202012Validator(schema).validate(json.loads(text_of(token_ids)))
    assert num_answers > 50
    assert num_complete == num_answers


def test_too_few_tokens_change_nothing() -> None:
    answers = [written(compiled(json=PERSON), random.Random(3), max_tokens) for max_tokens in (20, 30)]
    assert [is_complete for _, is_complete in answers] == [False, False]
    assert answers[1][0][:20] == answers[0][0]


@pytest.mark.parametrize(
    "wanted",
    [{"regex": "(ab?)+c"}, {"json_object": True}, {"grammar": 'start: "<" %json {"type": "array"} ">"'}],
)
def test_other_languages_end_too(wanted: dict[str, Any]) -> None:
    for seed in range(5):
        token_ids, is_complete = written(compiled(**wanted), random.Random(seed), 60)
        assert is_complete, text_of(token_ids)


def test_text_that_may_end_anywhere_is_cut_where_it_is() -> None:
    """Nothing is led: that it was cut must show. But what has no room to be whole does not begin."""
    grammar = compiled(grammar='start: TEXT ("<" %json {"type": "array"})?\nTEXT: /[a-z]*/')
    row = new_row(grammar, [], 6)
    assert row.matcher is not None
    for token_id in tokenizer().encode("abcd", False, allow_special=False):
        row.token_ids.append(row.advance(token_id))
        assert row.matcher.forced_id is None and not row.matcher.is_complete
    num_left = 6 - len(row.token_ids)
    (bracket,) = tokenizer().encode("<", False, allow_special=False)
    assert row.advance(bracket) == (bracket if num_left >= 3 else END_ID)


def test_a_row_of_closing_marks_in_a_string_closes_nothing() -> None:
    grammar = compiled(json={"type": "array", "items": {"type": "string"}})
    matcher = grammar.matcher()._inner
    spelled = {text: tokenizer().encode(text, False, allow_special=False) for text in ('["a', "]", '"]')}
    matcher.consume_tokens(spelled['["a'])
    assert not grammar.endings.completes(matcher, spelled["]"])
    assert grammar.endings.completes(matcher, spelled['"]'])


def test_min_tokens_that_leave_no_room_for_an_end() -> None:
    row = new_row(compiled(regex="a+"), [], 2, min_tokens=2)
    token_id = tokenizer().encode("a", False, allow_special=False)[0]
    assert row.advance(token_id) == token_id
    assert row.matcher is not None and row.matcher.forced_id is None


def test_an_answer_that_starts_over_is_led_the_same_way() -> None:
    grammar = compiled(json=PERSON)
    token_ids, _ = written(grammar, random.Random(1), 120)
    row = new_row(grammar, [], 120)
    for cut, token_id in enumerate(token_ids):
        if cut % 10 == 9:
            replayed = new_row(grammar, token_ids[:cut], 120)
            assert replayed.matcher is not None and row.matcher is not None
            assert replayed.matcher.forced_id == row.matcher.forced_id
        assert row.advance(token_id) == token_id
        row.token_ids.append(token_id)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [(b'{"a', True), (b'{"a"', False), (b'{"a\\"', True), (b'{"a\\\\"', False), (b"{\\", False), (b'{"a\\', True)],
)
def test_quotes(text: bytes, is_open: bool) -> None:
    piecewise = Quotes()
    for byte in text:
        piecewise = piecewise.after(bytes([byte]))
    assert Quotes().after(text).is_open == piecewise.is_open == is_open


REAL = json.loads((Path(__file__).parents[1] / "data" / "real-schemas" / "schemas.json").read_text())
REFUSED = {
    "interface.json": "#/definitions/ParameterLabel/propertyNames",
    "configuration.json": "#/properties/AWSTemplateFormatVersion/type",
}


@pytest.mark.parametrize("real", REAL, ids=lambda real: Path(real["path"]).name)
def test_answers_to_published_schemas_are_whole_and_valid(real: dict[str, Any]) -> None:
    schema = real["schema"]
    pointer = REFUSED.get(Path(real["path"]).name)
    if pointer is not None:
        with pytest.raises(RequestError, match=f"cannot be enforced at {pointer}: "):
            compiled(json=schema)
        return
    Validator = validator_for(schema, default=Draft202012Validator)
    for seed in range(3):
        token_ids, is_complete = written(compiled(json=schema), random.Random(seed), 400)
        assert is_complete, text_of(token_ids)
        Validator(schema).validate(json.loads(text_of(token_ids)))
