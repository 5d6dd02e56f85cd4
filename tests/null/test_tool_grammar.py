"""What grammars of calls let through: known functions with fitting arguments, nothing that the parser reads amiss."""

import json
import random
from typing import Any

import pytest

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import checked_lark
from strop.serve.tool_calls import ToolDelta, ToolFormat, Tools, ToolSupport

llguidance = pytest.importorskip("llguidance")

SPECIAL = ["<eos>", "<tool_call>", "</tool_call>"]
EOS = 256
ENDS = (*b'"}', EOS)


class Bytes:
    """A vocabulary of the 256 bytes and a few control tokens."""

    eos_token_id, bos_token_id = EOS, None
    tokens = [bytes([byte]) for byte in range(256)] + [b"\xff" + name.encode() for name in SPECIAL]
    special_token_ids = range(EOS, EOS + len(SPECIAL))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), slices=[])

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "}<"]}, "days": {"type": "integer"}},
    "required": ["city"],
}
LISTED = (
    {"type": "function", "function": {"name": "weather", "parameters": CITY | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "weather-2", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": CITY}}}},
    {"type": "function", "function": {"name": "note", "parameters": {"x-guidance": {"lenient": True}}}},
    {"type": "function", "function": {"name": "now"}},
)
STRICT = ({"type": "function", "function": {**LISTED[0]["function"], "strict": True}}, *LISTED[1:])
FORMS = {
    "hermes": ToolFormat("hermes", taught=True),
    "untaught": ToolFormat("hermes", taught=False),
    "control tokens": ToolFormat("hermes", taught=False, special_tokens=frozenset(SPECIAL[1:])),
    "llama3": ToolFormat("llama3", taught=True),
}


def matcher(form: str, tools: Tools) -> Any:
    shape = ToolSupport(FORMS[form]).grammar(tools)
    assert shape is not None and shape.grammar is not None
    found = llguidance.LLMatcher(TOKENIZER, checked_lark(shape.grammar), log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def tokens(form: str, text: str) -> list[int]:
    """Markers that are control tokens as one token."""
    ids = list(text.encode())
    for i, name in enumerate(SPECIAL):
        if name in FORMS[form].special_tokens:
            spelled = list(name.encode())
            while (at := next((k for k in range(len(ids)) if ids[k : k + len(spelled)] == spelled), None)) is not None:
                ids[at : at + len(spelled)] = [EOS + i]
    return ids


def accepts(form: str, tools: Tools, text: str) -> bool:
    found = matcher(form, tools)
    return all(found.consume_token(token) for token in tokens(form, text)) and found.is_accepting()


def call(form: str, name: str, arguments: Any) -> str:
    key = "parameters" if form == "llama3" else "arguments"
    text = json.dumps({"name": name, key: arguments}, ensure_ascii=False)
    return text if form == "llama3" else f"<tool_call>\n{text}\n</tool_call>"


def joined(form: str, *calls: str) -> str:
    return ("; " if form == "llama3" else "\n").join(calls)


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_a_model_that_was_taught_is_free(form: str) -> None:
    support = ToolSupport(FORMS[form])
    assert support.grammar(Tools(LISTED)) is None
    assert support.grammar(Tools(STRICT)) is not None
    assert support.grammar(Tools(LISTED, "required")) is not None
    assert ToolSupport(FORMS["untaught"]).grammar(Tools(LISTED)) is not None


@pytest.mark.parametrize("form", FORMS)
def test_required(form: str) -> None:
    tools, single = Tools(LISTED, "required"), Tools(LISTED, "required", parallel=False)
    good = [
        call(form, "weather", {"city": "Oslo", "days": 3}),
        call(form, "note", {"a": [1, "é"]}),
        call(form, "now", {}),
    ]
    for text in [*good, call(form, "weather-2", {"city": "}<"})]:
        assert accepts(form, tools, text)
        assert accepts(form, single, text)
    assert accepts(form, tools, joined(form, *good))
    assert not accepts(form, single, joined(form, *good))
    for text in (
        "",
        "Hello",
        "x" + good[0],
        call(form, "rain", {}),
        call(form, "weather", {}),
        call(form, "weather", {"city": "Rome"}),
        call(form, "weather", {"city": "Oslo", "other": 1}),
        call(form, "weather-2", {"city": "Rome"}),
        call(form, "note", [1]),
        call(form, "now", {"a": 1}),
    ):
        assert not accepts(form, tools, text), text


@pytest.mark.parametrize("form", FORMS)
def test_named(form: str) -> None:
    tools = Tools(LISTED, named="weather")
    good = call(form, "weather", {"city": "Oslo"})
    assert accepts(form, tools, good)
    assert not accepts(form, tools, joined(form, good, good))
    assert not accepts(form, tools, call(form, "now", {}))


@pytest.mark.parametrize("form", FORMS)
def test_text_or_calls(form: str) -> None:
    tools, single = Tools(STRICT), Tools(STRICT, parallel=False)
    good, bad = call(form, "weather", {"city": "Oslo"}), call(form, "weather", {"city": "Rome"})
    for text in ("", "Hello,\nI <think> {not} 1 < 2 日.", "a <tool_cal> b", good):
        assert accepts(form, tools, text), text
        assert accepts(form, single, text), text
    assert accepts(form, tools, joined(form, good, good))
    assert not accepts(form, single, joined(form, good, good))
    assert not accepts(form, tools, bad)
    if form == "llama3":
        assert not accepts(form, tools, "Well:\n" + bad)
        assert not accepts(form, tools, "Well: <|python_tag|>" + bad)
    else:
        assert accepts(form, single, "Well: " + good)
        assert not accepts(form, single, good + "text")
        assert accepts(form, tools, f"Well: {good}\nand{good} done")
        assert not accepts(form, tools, "Well: " + bad)
        assert not accepts(form, tools, good + "<tool_call>")


SHAPES = {
    "json": (StructuredOutputsParams(json={**CITY, "additionalProperties": False}), '{"city": "Oslo"}'),
    "json_object": (StructuredOutputsParams(json_object=True), '{"a": {"b": [1]}}'),
    "array": (StructuredOutputsParams(json={"type": "array", "items": {"type": "integer"}}), "[1, 2]"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_calls_or_an_answer_of_a_shape(form: str, shape: str) -> None:
    wanted, answer = SHAPES[shape]
    tools, single = Tools(LISTED, shape=wanted), Tools(LISTED, parallel=False, shape=wanted)
    good, bad = call(form, "weather", {"city": "Oslo"}), call(form, "weather", {"city": "Rome"})
    for text in (answer, good):
        assert accepts(form, tools, text), text
        assert accepts(form, single, text), text
    assert accepts(form, tools, joined(form, good, good))
    assert not accepts(form, single, joined(form, good, good))
    is_open = form == "llama3" and shape == "json_object"
    assert accepts(form, tools, bad) == is_open
    for text in ("", "Hello", good + answer, answer + good, answer[:-1], "Well: " + good):
        assert not accepts(form, tools, text), text
    parser = ToolSupport(FORMS[form]).parser(tools)
    assert "".join(str(piece) for piece in parser.push(answer, ended=True)) == answer
    (piece,) = ToolSupport(FORMS[form]).parser(tools).push(good, ended=True)
    assert isinstance(piece, ToolDelta) and piece.name == "weather"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_arguments_of_strict_functions_fit_in_any_case(form: str, shape: str) -> None:
    """Where an answer could be read as a call, its grammar would not have checked the arguments."""
    tools = Tools(STRICT, shape=SHAPES[shape][0])
    if form == "llama3" and shape != "json":
        with pytest.raises(RequestError, match="strict"):
            ToolSupport(FORMS[form]).grammar(tools)
    else:
        assert not accepts(form, tools, call(form, "weather", {"city": "Rome"}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [{"regex": "<.*"}, {"choice": ("{",)}, {"grammar": "start: /.*/"}], ids=str)
def test_only_json_can_be_told_from_calls(form: str, shape: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="only answers in JSON"):
        ToolSupport(FORMS[form]).grammar(Tools(LISTED, shape=StructuredOutputsParams(**shape)))


@pytest.mark.parametrize("text", ['{"type": "object"} start: "x"', "{", "[1]", '{"a": NaN}'])
def test_a_schema_is_one_value(text: str) -> None:
    with pytest.raises(RequestError, match="JSON"):
        ToolSupport(FORMS["hermes"]).grammar(Tools(LISTED, shape=StructuredOutputsParams(json=text)))


@pytest.mark.parametrize("properties", [5, None, [], {"name": {}}])
def test_a_schema_that_is_none_may_look_like_anything(properties: Any) -> None:
    shape = StructuredOutputsParams(json={"type": "object", "additionalProperties": False, "properties": properties})
    with pytest.raises(RequestError, match="strict"):
        ToolSupport(FORMS["llama3"]).grammar(Tools(STRICT, shape=shape))


def test_a_call_that_must_be_has_no_other_shape() -> None:
    wanted = StructuredOutputsParams(json_object=True)
    assert Tools(LISTED, "required", shape=wanted).shape is None
    assert Tools(LISTED, named="now", shape=wanted).shape is None


def test_markers_spelled_in_letters_force_a_call_too() -> None:
    found = matcher("control tokens", Tools(STRICT))
    assert found.consume_tokens(list(b"Well <tool_call>"))
    assert found.validate_tokens(list(b"no")) == 0
    assert found.validate_tokens(list(b'\n{"name": "now"')) == 15


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_grammar_lets_through_is_read_as_calls(form: str, choice: Any, seed: int) -> None:
    """A random walk, drawn to what ends strings and objects."""
    tools = Tools(STRICT, choice)
    support, found, rng = ToolSupport(FORMS[form]), matcher(form, tools), random.Random(seed)
    answer = tokens(form, "" if choice == "required" else '{"name": "' if form == "llama3" else "Hm <tool_call>")
    assert found.consume_tokens(answer)
    while len(answer) < 4000:
        mask = int.from_bytes(found.compute_bitmask(), "little")
        allowed = [token for token in range(EOS + len(SPECIAL)) if mask >> token & 1]
        ends = [token for token in allowed if token in ENDS]
        answer.append(rng.choice(ends if ends and rng.random() < 0.7 else allowed))
        if answer[-1] == EOS:
            break
        assert found.consume_token(answer[-1])
    assert answer.pop() == EOS
    text = b"".join(TOKENIZER.decode_bytes([t]) if t < EOS else SPECIAL[t - EOS].encode() for t in answer).decode()
    parser = support.parser(tools)
    calls: dict[int, list[str]] = {}
    for piece in parser.push(text, ended=True):
        if isinstance(piece, ToolDelta):
            name, arguments = calls.setdefault(piece.index, [piece.name or "", ""])
            calls[piece.index] = [name, arguments + piece.arguments]
        elif choice == "required":
            raise AssertionError(f"{piece!r} of {text!r} is no call")
    assert parser.num_calls == len(calls) >= 1
    for name, arguments in calls.values():
        value = json.loads(arguments)
        assert isinstance(value, dict)
        if name.startswith("weather"):
            assert value["city"] in ("Oslo", "}<")
