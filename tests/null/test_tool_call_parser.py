"""A model's text becomes plain text and calls, the same however it is cut, and nothing of it is lost."""

import json
import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.serve.tool_calls import ToolCallParser, ToolDelta, ToolFormat
from strop.serve.tool_calls.json_text import MAX_DEPTH, NotJsonError, encoded_object_text, value_text
from strop.serve.tool_calls.parser import MAX_HELD_CHARACTERS

HERMES, LLAMA3 = ToolFormat("hermes", taught=True), ToolFormat("llama3", taught=True)
FORMS = pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=["hermes", "llama3"])
NAMES = ("f", "get_weather", "get")

Read = tuple[str, list[tuple[str, str]], int]


def read(
    form: ToolFormat,
    texts: Iterable[str],
    *,
    names: Iterable[str] = NAMES,
    parallel: bool = True,
    cut: bool = False,
    **how: bool,
) -> Read:
    """The text, the calls as (name, arguments), and how many were complete."""
    parser = ToolCallParser(form, tuple(names), parallel, **how)
    pieces = [piece for text in texts for piece in parser.push(text)] + parser.push("", ended=True, cut=cut)
    calls: list[list[str]] = []
    ids = set()
    for piece in pieces:
        if isinstance(piece, ToolDelta):
            if piece.index == len(calls):
                assert piece.name is not None
                assert piece.id is not None
                ids.add(piece.id)
                calls.append([piece.name, ""])
            else:
                assert (piece.index, piece.id, piece.name) == (len(calls) - 1, None, None)
            calls[-1][1] += piece.arguments
        assert piece
    assert len(ids) == len(calls)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [(name, arguments) for name, arguments in calls], parser.num_calls


def hermes(*calls: tuple[str, Any]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


THOUGHT = f"<think>{hermes(('f', {}))}</think>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text, 1 < 2.\n", "Just text, 1 < 2.\n", []),
        (hermes(("f", {})), "", [("f", "{}")]),
        ("Sure.\n" + hermes(("f", {"a": 1}), ("get", {})) + "\n", "Sure.", [("f", '{"a": 1}'), ("get", "{}")]),
        (" \n" + hermes(("f", {})) + "\n\nDone.", "Done.", [("f", "{}")]),
        ("One.\n" + hermes(("f", {})) + "\n\nTwo.", "One.\n\nTwo.", [("f", "{}")]),
        # Names that are not known, though they begin like one that is, or the other way round.
        (hermes(("g", {})), hermes(("g", {})), []),
        (hermes(("get_w", {})), hermes(("get_w", {})), []),
        (hermes(("get_weathers", {})), hermes(("get_weathers", {})), []),
        # What only looks like a marker.
        ("a <tool_cal> b", "a <tool_cal> b", []),
        ("<<tool_call>x", "<<tool_call>x", []),
        ("</tool_call>", "</tool_call>", []),
        ("<tool_call>" + hermes(("f", {})), "<tool_call>", [("f", "{}")]),
        # Arguments that are text, nothing, or none.
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\ude00\\"}"}', "", [("f", '{"a": "😀"}')]),
        ('<tool_call>{"name": "f", "arguments": " "}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
        # Another order, other members, other key, no line breaks, lists, and the end marker or a brace left out.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": 7, "name": "f", "x": ["}"], "parameters": {}, "y": -1e3}', "", [("f", "{}")]),
        ('<tool_call>[{"name": "f"}, {"name": "get"}]</tool_call>!', "!", [("f", "{}"), ("get", "{}")]),
        ('<tool_call>{"name": "f"}\n{"name": "get"}</tool_call>', "", [("f", "{}"), ("get", "{}")]),
        ('<tool_call>{"name": "f"}<tool_call>{"name": "get"}', "", [("f", "{}"), ("get", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}\n</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}\n}</tool_call><a', "<a", [("f", "{}")]),
        # Braces and markers in strings are the strings'.
        (hermes(("f", {"a": '}</tool_call>{"\\'})), "", [("f", '{"a": "}</tool_call>{\\"\\\\"}')]),
        # Line breaks that stand bare in a string.
        ('<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}', "", [("f", '{"a": "x\\ny\\t"}')]),
        # Broken before the call has begun to come out.
        ('<tool_call>{"name": "f", "arguments": 5}', '<tool_call>{"name": "f", "arguments": 5}', []),
        ('<tool_call>{"name": "f", "arguments": "Paris"}', '<tool_call>{"name": "f", "arguments": "Paris"}', []),
        ('<tool_call>{"name": "f", "arguments"', '<tool_call>{"name": "f", "arguments"', []),
        ("<tool_call>\nno", "<tool_call>\nno", []),
        # Thinking of calls is not calling.
        (f"{THOUGHT}\n" + hermes(("get", {})), THOUGHT, [("get", "{}")]),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(HERMES, [text]) == (content, calls, len(calls))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": "1"}}', "", [("f", '{"a": "1"}')]),
        ('<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        ('\n {"name": "f", "parameters": {}}; {"name": "get", "parameters": {}}', "", [("f", "{}"), ("get", "{}")]),
        ('{"name": "f", "parameters": {}}\n{"name": "get", "parameters": {}}', "", [("f", "{}"), ("get", "{}")]),
        ('[{"name": "f", "parameters": {}}, {"name": "get", "arguments": {}}]', "", [("f", "{}"), ("get", "{}")]),
        ('I will.\n{"name": "f", "parameters": {}}\nSo.', "I will.\nSo.", [("f", "{}")]),
        ('A <|python_tag|>{"name": "f"} b', "A b", [("f", "{}")]),
        # Inside a line, of an unknown name, or of another shape it is text.
        ('Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', []),
        ('{"name": "g", "parameters": {}}', '{"name": "g", "parameters": {}}', []),
        ('{"city": "f"}\n[1]; <|python_tag|>print()', '{"city": "f"}\n[1]; <|python_tag|>print()', []),
        ('{"name": "f", "parameters": {}}; and', "; and", [("f", "{}")]),
    ],
)
def test_llama3(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(LLAMA3, [text]) == (content, calls, len(calls))


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('{"a": Paris}}</tool_call>', "Paris}}</tool_call>", '{"a": '),
        ('{"a": nul}}', "nul}}", '{"a": '),
        ('{"a": "\\x"}}', '\\x"}}', '{"a": "'),
        ('{"a": 1', "", '{"a": '),
        ('{"a": "Par', "", '{"a": "Par'),
    ],
)
def test_a_call_that_breaks_late_is_not_counted(text: str, content: str, arguments: str) -> None:
    assert read(HERMES, ['<tool_call>{"name": "f", "arguments": ' + text]) == (content, [("f", arguments)], 0)


TWO = {
    HERMES: "\n" + hermes(("f", {"a": [1, "é\\"]}), ("get", {})),
    LLAMA3: '{"name": "f", "parameters": {"a": [1, "é\\""]}}; {"name": "get", "parameters": {}}',
}


@FORMS
@pytest.mark.parametrize("cut", [True, False])
def test_calls_that_are_forced_show_no_markup_wherever_they_are_cut_off(form: ToolFormat, cut: bool) -> None:
    (_, whole), (_, nothing) = read(form, TWO[form])[1]
    for end in range(len(TWO[form]) + 1):
        text = TWO[form][:end]
        content, calls, _ = read(form, text, only_calls=True, cut=cut)
        assert read(form, [text], only_calls=True, cut=cut)[:2] == (content, calls)
        assert content.strip() == ""
        assert len(calls) < 2 or calls[1] in (("get", "{"), ("get", nothing))
        assert not calls or (calls[0][0] == "f" and whole.startswith(calls[0][1]))


@pytest.mark.parametrize(
    ("form", "text", "content"),
    [
        (HERMES, "Well:<tool_call>", "Well:"),
        (HERMES, '<tool_call>\n{"na', ""),
        (HERMES, '<tool_call>\n{"name": "g', ""),
        (HERMES, "1 <", "1 <"),
        (LLAMA3, "<|python_tag|>{", ""),
        (LLAMA3, '{"name": "f", "par', ""),
        (LLAMA3, '{"name": "g', '{"name": "g'),  # it may become JSON of another kind
        (LLAMA3, '{"a": "f"', '{"a": "f"'),
    ],
)
def test_what_has_begun_as_a_call_is_no_text_if_it_is_cut_off(form: ToolFormat, text: str, content: str) -> None:
    assert read(form, text, cut=True) == (content, [], 0)
    assert read(form, text)[0] == text  # the model itself left it so
    for end in ("</tool_", "<", "\n", "</tool_call>\n<tool_call>\n"):
        assert read(HERMES, hermes(("f", {})).removesuffix("</tool_call>") + end, cut=True)[0] == ""


@FORMS
@pytest.mark.parametrize(
    "text",
    [
        "Sure: {0}",
        '{{"a": 1}}{0}',
        '{{"a": "b"}}\n{0}',
        '{{"parameters": {{}}, "name": "f"}}',
        '[{{"a": {{}}}}, {0}]',
        '"<tool_call>{{{0}"',
        "x <tool_call>{{",
    ],
)
def test_an_answer_of_another_shape_has_no_calls(form: ToolFormat, text: str) -> None:
    text = text.format(TWO[form].strip())
    for cut in (True, False):
        assert read(form, text, calls_or_text=True, cut=cut) == (text, [], 0)
    assert len(read(form, TWO[form], calls_or_text=True)[1]) == 2


def test_an_answer_of_another_shape_is_not_held_back() -> None:
    parser = ToolCallParser(LLAMA3, NAMES, calls_or_text=True)
    assert parser.push('{"name') == []
    assert parser.push('s": [') == ['{"names": [']
    assert parser.push('"f", {"') == ['"f", {"']


@FORMS
def test_one_call_at_most(form: ToolFormat) -> None:
    one = hermes(("f", {})) if form is HERMES else '{"name": "f", "parameters": {}}'
    assert read(form, ["Two:\n" + one + "\n" + one + " text"], parallel=False) == ("Two:", [("f", "{}")], 1)


def test_fragments_come_as_soon_as_they_are_certain() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('Go.\n<tool_call>\n{"name": "get_weather"') == ["Go."]
    assert parser.push(', "arguments": ') == []
    (begun,) = parser.push("{")
    assert isinstance(begun, ToolDelta)
    assert (begun.name, begun.arguments, parser.num_calls) == ("get_weather", "{", 0)
    arriving = '"city": "Par\\u00e9", "days": '
    escaped = arriving.index("\\")
    for position, character in enumerate(arriving):
        waits = escaped <= position < escaped + 5
        expected = [] if waits else ["\\u00e9" if position == escaped + 5 else character]
        assert [piece.arguments for piece in parser.push(character) if isinstance(piece, ToolDelta)] == expected
    assert parser.push("12") == []
    assert parser.push("}") == [ToolDelta(0, "12}")]
    assert parser.push("}\n</tool_call>", ended=True) == []
    assert parser.num_calls == 1


PARTS = [
    "<tool_call>", "</tool_call>", "<tool", "_call>", "<", "<think>", "</think>", "<|python_tag|>", "<|py", "\n", " ",
    '{"name": "f", ', '{"name": "get', '"arguments": ', '"parameters": {', '{"a": ', '"{\\"a\\": ', "\\ud83d",
    "\\ude00", '"', "}", "]", "[", "{", ":", ",", ";", "\\", "\\n", "1.5e3", "nul", "null", "text", "é日😀",
    "\x00", "\ud800", hermes(("f", {"x": [1, {"y": '"}'}]})), hermes(("g", {})),
    '{"name": "f", "parameters": {"x": "é"}}',
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@FORMS
@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 400), max_size=20),
    how=st.fixed_dictionaries({name: st.booleans() for name in ("parallel", "cut", "only_calls", "calls_or_text")}),
)
def test_however_the_text_is_cut(form: ToolFormat, text: str, cuts: list[int], how: dict[str, bool]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    assert read(form, pieces, **how) == read(form, text, **how) == read(form, [text], **how)


@FORMS
@given(text=TEXTS)
def test_without_tools_text_stays_as_it_is(form: ToolFormat, text: str) -> None:
    assert read(form, [text], names=()) == (text, [], 0)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), VALUES, max_size=3)), min_size=1, max_size=3
)


@FORMS
@given(calls=CALLS, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]), encoded=st.booleans())
def test_arguments_of_every_kind(
    form: ToolFormat, calls: list[tuple[str, Any]], ascii_only: bool, indent: int | None, encoded: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    key = "arguments" if form is HERMES else "parameters"
    objects = [dump({"name": name, key: dump(value) if encoded else value}) for name, value in calls]
    text = "\n".join(f"<tool_call>\n{o}\n</tool_call>" for o in objects) if form is HERMES else "; ".join(objects)
    content, found, num_calls = read(form, text)
    assert (content, num_calls) == ("", len(calls))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def accepts(kind: Any, text: str) -> str | None:
    """What the reader makes of `text`, if it ends with its last character."""
    out: list[str] = []
    reader = kind(out)
    next(reader)
    for position, character in enumerate(text):
        try:
            reader.send(character)
        except StopIteration:
            return "".join(out) if position == len(text) - 1 else None
        except NotJsonError:
            return None
    return None


def refuse(constant: str) -> Any:
    raise ValueError(constant)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from([*'{}[]:,"\\ 01-.eE+u', '"a"', "true", "null", "NaN", "\\u00e9", "1", "\n"]), max_size=12)
)
def test_json_is_what_json_is(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        value = json.loads(text, strict=False, parse_constant=refuse)
    except ValueError:
        value = None
    is_one = isinstance(value, dict | list | str) and text == text.strip()
    found = accepts(value_text, text)
    assert (found is not None) == is_one
    if found is not None:
        assert json.loads(found) == value


@given(VALUES, st.booleans())
def test_json_comes_out_as_it_went_in(value: Any, ascii_only: bool) -> None:
    text = json.dumps([value], ensure_ascii=ascii_only)
    assert accepts(value_text, text) == text
    text = json.dumps({"": value}, ensure_ascii=ascii_only)
    assert accepts(encoded_object_text, json.dumps(f" {text}\n", ensure_ascii=ascii_only)) == text


def test_depth_is_bounded() -> None:
    assert accepts(value_text, "[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert accepts(value_text, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None


HOSTILE = [
    "<", "{", "[", "\n{", "<tool_call>", '<tool_call>{"x":"', '\n{"name":', "<tool_call>[",
    '<tool_call>{"name": "f", "arguments": {"a":', '{"name": "f"}', "<think>", " ", "\n",
]  # fmt: skip
BEGINNINGS = [
    '<tool_call>{"name": "f", "arguments": {"a": ', '<tool_call>{"name": "f", "arguments": {"a": "',
    '<tool_call>{"arguments": {"a": "', '<tool_call>{"name": "f", "arguments": "{\\"a\\": ', "",
]  # fmt: skip


def num_calls_made(form: ToolFormat, text: str) -> int:
    """Of Python functions, as a measure of the work."""
    count = 0

    def profile(_frame: Any, _event: str, _argument: Any) -> None:
        nonlocal count
        count += 1

    parser = ToolCallParser(form, NAMES)
    sys.setprofile(profile)
    try:
        parser.push(text, ended=True)
    finally:
        sys.setprofile(None)
    return count


@FORMS
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("unit", HOSTILE)
def test_time_is_linear_in_the_text(form: ToolFormat, beginning: str, unit: str) -> None:
    short, long = (num_calls_made(form, beginning + unit * (num // len(unit))) for num in (500, 2_000))
    assert long < 4.5 * short + 1000


@FORMS
@pytest.mark.parametrize(
    ("beginning", "unit"),
    [
        ("", " "),
        ('<tool_call>{"x": "', "x"),
        ('{"name": "f", "x": "', "x"),
        ('<|python_tag|>{"parameters": {"a": "', "x"),
    ],
)
def test_what_is_held_back_is_bounded(form: ToolFormat, beginning: str, unit: str) -> None:
    text = beginning + unit * (MAX_HELD_CHARACTERS + 1)
    assert ToolCallParser(form, NAMES).push(text) == [text]
