"""Structured output without a model: what each kind of wish accepts, what masks hold, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from grammar_helpers import END_ID, VOCAB_SIZE, accepts, allowed_ids, compiled, grammars, tokenizer

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import MAX_TEXT_BYTES, Grammars

ID_OF = {tokenizer().token_bytes(token_id): token_id for token_id in range(tokenizer().vocab_size)}


@pytest.mark.parametrize(
    ("wanted", "accepted", "refused"),
    [
        ({"choice": ["yes", "no", 'a "b"\n\0é😀\\']}, ["yes", "no", 'a "b"\n\0é😀\\'], ["", "ye", "yesno", "maybe"]),
        ({"choice": "one"}, ["one"], ["o", "ones"]),
        ({"regex": r"\d{2,3}(-[a-c]+)?"}, ["12", "123-abc"], ["1", "1234", "12-", "x12"]),
        ({"regex": "^a/b.$"}, ["a/bé"], ["a/b", "xa/bc", "a/b\n"]),
        ({"grammar": 'start: "a" B+\nB: /[bc]/'}, ["ab", "abcb"], ["a", "abd"]),
        ({"grammar": 'start: "<" x ">"\nx: %json {"type": "integer"} // %json {"not": {}}'}, ["<12>"], ["<a>", "<>"]),
        ({"json_object": True}, ["{}", '{"a": [1]}'], ["[]", "1", ""]),
        ({"json": True}, ["1", "[]"], ["x"]),
    ],
)
def test_each_kind_of_wish(wanted: dict[str, object], accepted: list[str], refused: list[str]) -> None:
    grammar = compiled(**wanted)
    for text in accepted:
        assert accepts(grammar, text), text
    for text in refused:
        assert not accepts(grammar, text), text


def test_the_end_is_allowed_where_the_grammar_may_end_and_only_there() -> None:
    matcher = compiled(regex="a{2,3}").matcher()
    a = ID_OF[b"a"]
    assert allowed_ids(matcher) == {a}
    matcher.advance(a)
    assert allowed_ids(matcher) == {a}
    matcher.advance(a)
    assert allowed_ids(matcher) == {a, END_ID}
    assert not matcher.is_complete
    matcher.advance(a)
    assert matcher.is_complete and matcher.error is None
    assert allowed_ids(matcher) == {END_ID}

    matcher = compiled(regex="a+").matcher()
    matcher.advance(a)
    matcher.advance(END_ID)
    assert matcher.is_complete


def test_masks_leave_out_control_tokens_and_padding_and_rows_that_want_nothing_allow_all() -> None:
    anything = compiled(regex="[^]*").matcher()
    allowed = allowed_ids(anything)
    assert allowed >= {
        END_ID,
        *(ID_OF[bytes([byte])] for byte in range(128)),
        ID_OF[b"hello"],
        ID_OF["<note é>".encode()],
    }
    assert not allowed & {0, ID_OF[b"\x80"], *range(tokenizer().vocab_size, VOCAB_SIZE)}  # \x80 begins no character
    masks = grammars().masks([None, anything, None], 4)
    assert masks.dtype == np.uint32 and masks.shape == (4, -(-VOCAB_SIZE // 32)) and masks.flags.c_contiguous
    assert (masks[[0, 2, 3]] == 0xFFFFFFFF).all()
    # Control tokens are no text, not even where their names would be.
    matcher = compiled(choice=["<|start|>"]).matcher()
    assert 0 not in allowed_ids(matcher)
    assert accepts(compiled(choice=["<|start|>"]), "<|start|>")
    assert allowed_ids(compiled(grammar='start: <|start|> "a"').matcher()) == {0}


def test_masks_of_many_answers_are_those_of_each_alone() -> None:
    texts = ['{"a": [1, 2', '{"b', "{", '{"a": "x', '{"a": -1']
    matchers = []
    for text in texts:
        matcher = compiled(json={"type": "object"}).matcher()
        for token_id in tokenizer().encode(text, False):
            matcher.advance(token_id)
        matchers.append(matcher)
    together = grammars().masks(matchers, len(matchers))
    for matcher, row in zip(matchers, together, strict=True):
        assert (grammars().masks([matcher], 1)[0] == row).all()


def test_a_vocabulary_without_an_end() -> None:
    @dataclass
    class Endless:
        vocab_size: int = 64
        special_ids: frozenset[int] = frozenset({63})
        eos_ids: frozenset[int] = frozenset()

        def token_bytes(self, token_id: int) -> bytes:
            return bytes([32 + token_id])

    mine = Grammars(Endless(), 64, 1)
    matcher = mine.compile(StructuredOutputsParams(regex="1+2?")).matcher()
    one, two = ord("1") - 32, ord("2") - 32
    assert mine.masks([matcher], 2).tolist() == [[1 << one, 0], [0xFFFFFFFF, 0xFFFFFFFF]]
    matcher.advance(one)
    assert mine.masks([matcher], 1).tolist() == [[1 << one | 1 << two, 0]]
    matcher.advance(two)
    assert matcher.is_complete


def test_an_answer_that_outgrows_its_limits_has_an_error_and_no_tokens() -> None:
    matcher = compiled(grammar='start: a{1,300}\na: b{1,300}\nb: "a" | "c"').matcher()
    for _ in range(100):
        if not allowed_ids(matcher):
            break
        matcher.advance(ID_OF[b"a"])
    assert matcher.error is not None and "2000" in matcher.error
    assert not matcher.is_complete
    assert not allowed_ids(matcher)


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    matcher = compiled(regex="a").matcher()
    matcher.advance(ID_OF[b"b"])
    assert matcher.error is not None and not matcher.is_complete
    assert not allowed_ids(matcher)


@pytest.mark.parametrize(
    ("wanted", "cause"),
    [
        ({"regex": "(?=a)"}, "lookaround"),
        ({"regex": "a^b"}, "structured_outputs.regex cannot be enforced"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"grammar": ""}, "structured_outputs.grammar cannot be enforced"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"grammar": '{"grammars": [{"json_schema": {"not": {}}}]}'}, "structured_outputs.grammar"),
        ({"grammar": 'start: "a" %json {"not": {}}'}, "at #/not: "),
        ({"grammar": 'start: a\na[lazy]: "x:"\n  b_1: %json {"not": {}}'}, "in rule b_1 of the grammar"),
        ({"grammar": 'start: %json // so?\n{"x-guidance": {"lenient": true}, "not": {}}'}, "cannot be enforced"),
        ({"grammar": 'start: %json{"not": {}}'}, "at #/not: "),
        ({"grammar": 'start: /a\\/b/ %json {"not": {}} "%json"'}, "at #/not: "),
        ({"grammar": 'start[temperature=0.5]: "a"'}, "temperature"),
        ({"grammar": 'start[capture, stop = "x"]: /.*/'}, "'stop'"),
        ({"choice": ["x" * MAX_TEXT_BYTES, "y"]}, f"at most {MAX_TEXT_BYTES}"),
        ({"json": '"' + "x" * MAX_TEXT_BYTES + '"'}, f"at most {MAX_TEXT_BYTES}"),
    ],
)
def test_what_is_refused(wanted: dict[str, object], cause: str) -> None:
    with pytest.raises(RequestError, match=cause.replace("(", r"\(").replace("[", r"\[")):
        compiled(**wanted)


def test_options_in_texts_are_not_options() -> None:
    assert accepts(compiled(grammar='start: "stop=" T // temperature = 1\nT: /stop=\\/x/'), "stop=stop=/x")


def test_threads_share_grammars() -> None:
    mine = Grammars(tokenizer(), VOCAB_SIZE, 1)
    wishes = [StructuredOutputsParams(choice=[f"w{i % 7}"]) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(mine.compile, wishes))
    assert all(accepts(grammar, f"w{i % 7}") for i, grammar in enumerate(made))
