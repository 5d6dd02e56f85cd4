"""Thoughts are told apart from answers: however a text is cut, in all replies, and with a shape after them."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_exchanges import CHAT, USER, WEATHER, answer, body, drive, served
from test_openai_chat import completion, streamed
from test_openai_responses import kinds, response
from test_openai_responses import streamed as streamed_response
from test_tool_grammar import EOS, LISTED, STRICT, TOKENIZER

from strop.core.request import SamplingParams, StructuredOutputsParams
from strop.engine.grammar import checked_lark
from strop.formats.template_worker import answer as answer_template
from strop.formats.template_worker import environment
from strop.serve.openai import chat, responses
from strop.serve.openai.errors import ApiError
from strop.serve.openai.messages import effort_variable
from strop.serve.openai.reasoning import ThinkTags, ThoughtSplitter, opens_thoughts, think_tags
from strop.serve.tool_calls import ToolFormat, Tools, ToolSupport

llguidance = pytest.importorskip("llguidance")

THINKS = {"thinking": ThinkTags()}


def split(texts: list[str], is_open: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(is_open)
    pieces = [splitter.push(text) for text in texts] + [splitter.push("", ended=True)]
    return "".join(thoughts for thoughts, _ in pieces), "".join(answers for _, answers in pieces)


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "answers"),
    [
        ("<think>\nHm.\n</think>\n\nHi!\n", False, "Hm.", "Hi!\n"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("Hm.\n\nSo.</think>\n\nHi", True, "Hm.\n\nSo.", "Hi"),
        ("<think>\nHm.</think>Hi", True, "Hm.", "Hi"),  # opened twice
        ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
        ("<think>for ever ", False, "for ever", ""),
        ("a </thin", True, "a </thin", ""),
        ("<think>a </think", False, "a </think", ""),
        ("<think>a <b> </th </think><think>c</think>", False, "a <b> </th", "<think>c</think>"),
        (" Hi <think>a</think>", False, "", " Hi <think>a</think>"),
        ("<thin", False, "", "<thin"),
        ("a</think>b", False, "", "a</think>b"),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
    ],
)
def test_thoughts_and_answers(text: str, is_open: bool, thoughts: str, answers: str) -> None:
    assert split([text], is_open) == split(list(text), is_open) == (thoughts, answers)


PARTS = ["<think>", "</think>", "<", "</", "think>", "</th", "<think", ">", " ", "\n", "a", "b.", "é😀", "\ud800"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.lists(st.integers(0, 60)), st.booleans())
def test_however_the_text_is_cut(text: str, cuts: list[int], is_open: bool) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = re.fullmatch(r"(?s)\s*<think>\s*(.*?)\s*(?:</think>\s*(.*))?", text)
    if is_open and found is None:
        found = re.fullmatch(r"(?s)\s*(.*?)\s*(?:</think>\s*(.*))?", text)
    expected = ("", text) if found is None else (found[1], found[2] or "")
    assert split([text[start:end] for start, end in pairwise(bounds)], is_open) == expected


def test_thoughts_come_as_they_are_thought() -> None:
    splitter = ThoughtSplitter(False)
    assert [splitter.push(text) for text in ("<think>", "\n", "a", " ", "b <", "/c")] == [
        ("", ""), ("", ""), ("a", ""), ("", ""), (" b", ""), (" </c", "")
    ]  # fmt: skip
    assert splitter.is_thinking
    assert splitter.push("</think>\n\nHi ") == ("", "Hi ")
    assert splitter.push("\n") == ("", "\n") and not splitter.is_thinking


def test_who_thinks_is_read_off_the_template_and_the_vocabulary() -> None:
    assert think_tags("{{ message.content.split('</think>')[-1] }}", ["<s>"]) == ThinkTags()
    assert think_tags("{{ messages }}", ["</think>"]) == ThinkTags(frozenset({"</think>"}))
    assert think_tags("{{ messages }}", ["<s>"]) is None


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("Qwen-Qwen3-0.6B", ["free", "free", "closed"]),
        ("Qwen3.5-4B", ["open", "open", "closed"]),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", ["open", "open", "open"]),
        ("HuggingFaceTB-SmolLM3-3B", ["free", "free", "closed"]),
        ("meta-llama-Llama-3.1-8B-Instruct", None),
    ],
)
def test_the_templates_of_real_models(name: str, ends: list[str] | None) -> None:
    """How a prompt ends without enable_thinking, with it, and with it off."""
    path = Path(os.environ.get("STROP_CHAT_TEMPLATES", "")) / "llama.cpp" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("no real chat templates here: set STROP_CHAT_TEMPLATES (tests/golden/README.md)")
    source = path.read_bytes().decode()
    assert (think_tags(source, []) is None) == (ends is None)
    for choice, end in zip(({}, {"enable_thinking": True}, {"enable_thinking": False}), ends or (), strict=False):
        variables = {"messages": [USER], "add_generation_prompt": True, "bos_token": "", "tools": None, **choice}
        reply = answer_template(
            environment(), {"template": source, "variables": variables, "max_output_bytes": 1 << 20}
        )
        text = reply["text"].decode()
        found = "closed" if text.rstrip().endswith("</think>") else "free"
        assert ("open" if opens_thoughts(text) else found) == end


def accepts(wanted: StructuredOutputsParams, text: str) -> bool:
    assert wanted.grammar is not None
    matcher = llguidance.LLMatcher(TOKENIZER, checked_lark(wanted.grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(token) for token in text.encode()) and matcher.is_accepting()


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLS = ToolSupport(ToolFormat("hermes", taught=True))


def calls(*args: Any, **more: Any) -> StructuredOutputsParams:
    grammar = CALLS.grammar(Tools(*args, **more))
    assert grammar is not None
    return grammar


JSON = StructuredOutputsParams(json={"enum": [{"a": 1}]})
SHAPES = [
    (JSON, '{"a": 1}'),
    (StructuredOutputsParams(json_object=True), '{"<think>": "</think>"}'),
    (StructuredOutputsParams(regex=r"\d{3}"), "123"),
    (StructuredOutputsParams(regex=r"<[^]*\d"), "<thin> 1"),
    (StructuredOutputsParams(choice=("yes", "<t")), "<t"),
    (StructuredOutputsParams(grammar='start: X %json {"const": 1}\nX: "x"'), "x1"),
    (calls(LISTED, "required"), CALL),
    (calls(LISTED, shape=JSON), CALL),
    (calls(LISTED, shape=JSON), '{"a": 1}'),
]


@pytest.mark.parametrize(("shape", "good"), SHAPES, ids=str)
def test_a_shape_begins_after_the_thoughts(shape: StructuredOutputsParams, good: str) -> None:
    tags = ThinkTags()
    begun, free = tags.grammar(shape, is_open=True), tags.grammar(shape, is_open=False)
    thoughts = "Is 1 < 2?\n<tool_call>\nno </thin\n</think>"
    for space in ("", "\n\n"):
        assert accepts(begun, thoughts + space + good)
        assert accepts(free, "<think>\n" + thoughts + space + good)
    assert accepts(free, good) and not accepts(begun, good)
    for text in (thoughts + good, thoughts, "Hm " + good, "<think>" + thoughts + good + "x", f"<think>{good}"):
        assert not accepts(free, text), text


def test_tags_that_are_control_tokens() -> None:
    """Here <tool_call> stands for <think>: what matters is that they are written without quotes."""
    grammar = ThinkTags(frozenset({"<think>", "</think>"})).grammar(JSON, is_open=False).grammar
    assert grammar is not None
    tokens = grammar.replace("<think>", "<tool_call>").replace("</think>", "</tool_call>")
    for end in ([EOS + 2], list(b"</tool_call>")):
        matcher = llguidance.LLMatcher(TOKENIZER, checked_lark(tokens), log_level=0)
        ids = [EOS + 1, *b"a b", *end, *b'\n{"a": 1}']
        assert all(matcher.consume_token(token) for token in ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("...<think>\n", "begun"), ("...<think>\n\n</think>\n\n", "closed"), ("...assistant\n", "free")],
)
def test_the_prompts_end_says_where_the_shape_begins(prompt: str, wanted: str) -> None:
    params = SamplingParams(structured_outputs=JSON)
    shapes = {
        "begun": ThinkTags().grammar(JSON, is_open=True),
        "free": ThinkTags().grammar(JSON, is_open=False),
        "closed": JSON,
    }
    assert ThinkTags().params(params, prompt).structured_outputs == shapes[wanted]
    assert ThinkTags().params(SamplingParams(), prompt) == SamplingParams()
    assert not ThinkTags(frozenset({"</think>"})).params(params, prompt).skip_special_tokens


def exchange(*, prompt: str = "", server: dict[str, Any] = THINKS, **fields: Any) -> tuple[chat.ChatExchange, Any]:
    made = chat.parse(body(CHAT, fields), served(**server), request_id="x", created_s=5)
    return made, made.begin(0, tuple(prompt.encode()))


TEXT = "<think>\nHm, é.\n</think>\n\nHi!"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_open", [False, True])
def test_chat_gives_thoughts_apart(stream: bool, is_open: bool) -> None:
    text = TEXT.removeprefix("<think>") if is_open else TEXT
    made, _ = exchange(stream=stream, stream_options={"include_usage": True} if stream else None)
    deltas = answer(*text)
    made.begin(0, tuple(b"...<think>\n" if is_open else b"...\n"))
    sent = b"".join(made.push(0, delta) for delta in deltas) + made.end()
    reply = streamed(sent) if stream else completion(sent)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Hi!", "Hm, é.", "Hm, é.")
    usage = reply.usage
    assert usage.completion_tokens == len(text.encode()) + 1
    thought = len(text[: text.index("</think>")].encode()) + len("</think>")
    not_yet_known = 0 if is_open else len("<think")
    assert usage.completion_tokens_details.reasoning_tokens == thought - not_yet_known


def test_an_answer_without_thoughts_has_no_such_field() -> None:
    made, _ = exchange()
    message = json.loads(drive(made, answer("Hi")))["choices"][0]["message"]
    assert not message.keys() & {"reasoning", "reasoning_content"}
    made, _ = exchange(server={})
    message = json.loads(drive(made, answer(TEXT)))["choices"][0]["message"]
    assert message["content"] == TEXT and "reasoning" not in message


def test_thoughts_can_be_left_out() -> None:
    made, _ = exchange(include_reasoning=False)
    reply = json.loads(drive(made, answer(TEXT)))
    message = reply["choices"][0]["message"]
    assert message["content"] == "Hi!" and not message.keys() & {"reasoning", "reasoning_content"}
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_thoughts_that_are_cut_off_are_all_there_is() -> None:
    made, _ = exchange()
    (choice,) = json.loads(drive(made, answer("<think>Hm", finish_reason="length")))["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"], choice["finish_reason"]) == ("", "Hm", "length")


def test_log_probabilities_are_of_the_answer() -> None:
    made, _ = exchange(logprobs=True)
    (choice,) = json.loads(drive(made, answer("<think>", "a", "</think>", "Hi", logprob=-1.0)))["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["H", "i"]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_thoughts_are_no_calls(stream: bool) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    made, params = exchange(tools=tools, stream=stream, server={**THINKS, "tools": CALLS})
    assert params.structured_outputs is None
    sent = drive(made, answer(*f"<think>{call}</think>\n{call}"))
    (choice,) = (streamed(sent) if stream else completion(sent)).choices
    assert len(choice.message.tool_calls) == 1 and choice.message.reasoning_content == call
    _, params = exchange(tools=tools, tool_choice="required", server={**THINKS, "tools": CALLS}, prompt="<think>")
    assert accepts(params.structured_outputs, f"hm</think>{call}")
    assert not accepts(params.structured_outputs, call)
    assert CALLS.grammar(Tools(STRICT)) is not None


def test_responses_have_an_item_of_thoughts() -> None:
    def sent(stream: bool) -> bytes:
        request = body(model="tiny", input="Hello", stream=stream)
        return drive(responses.parse(request, served(**THINKS), request_id="x", created_s=5), answer(*TEXT))

    reply = response(sent(stream=False))
    thoughts, message = reply.output
    assert (thoughts.type, thoughts.status, thoughts.summary) == ("reasoning", "completed", [])
    assert thoughts.content[0].text == "Hm, é." and message.content[0].text == "Hi!" == reply.output_text
    assert reply.usage.output_tokens_details.reasoning_tokens > 5
    in_stream = streamed_response(sent(stream=True))
    assert [item.content[0].text for item in in_stream.output] == ["Hm, é.", "Hi!"]
    names = kinds(sent(stream=True))
    part = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    items = [name.format(kind) for kind in ("reasoning_text", "output_text") for name in part]
    assert [name for i, name in enumerate(names) if name != names[i - 1]] == [
        "created",
        "in_progress",
        *items,
        "completed",
    ]
    output = [item.to_dict() for item in reply.output]
    history = [{"type": "message", **USER}, *output, {"type": "message", **USER}]
    again = responses.parse(body(model="tiny", input=history), served(**THINKS), request_id="x", created_s=5)
    assert again.asked[0].prompt == [
        USER, {"role": "assistant", "content": "Hi!", "reasoning_content": "Hm, é."}, USER
    ]  # fmt: skip


def test_no_effort_is_no_thinking() -> None:
    template = "{% if enable_thinking is false %}"
    assert effort_variable("none", template, "reasoning_effort") == {"enable_thinking": False}
    with pytest.raises(ApiError, match="only none"):
        effort_variable("low", template, "reasoning_effort")
    with pytest.raises(ApiError, match="no reasoning effort;"):
        effort_variable("none", "", "reasoning_effort")
    assert effort_variable("none", "{{ reasoning_effort }}", "reasoning_effort") == {"reasoning_effort": "none"}
