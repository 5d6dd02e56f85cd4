"""A chat's answers when they are stopped, and what the next one finds computed already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.cli import chat
from strop.cli.chat_session import ChatSession
from strop.cli.options import sampling_flags
from strop.core.errors import FormatError, RequestError
from strop.llm import LLM

OPTIONS = sampling_flags(chat.command)
SETTINGS = chat.command.make_context("chat", ["x", "--ignore-eos", "--max-tokens", "12"]).params
QUESTION = "what takes more than one block of the cache"


@pytest.fixture(scope="module")
def llm(tiny_path: Callable[..., Path], loaded: Callable[..., Any]) -> LLM:
    loaded()  # skips without the native library
    return LLM(str(tiny_path()), max_num_seqs=1, max_context_len=128, num_threads=2)


def session(llm: LLM, system: str | None = None, template: str | None = None) -> ChatSession:
    return ChatSession(llm.engine, "tiny", system=system, chat_template=template, settings=SETTINGS, options=OPTIONS)


def never() -> bool:
    return False


def test_a_stopped_answer_is_kept_as_far_as_it_came(llm: LLM) -> None:
    whole, stopped = session(llm), session(llm)
    pieces: list[str] = []
    assert "max_tokens=12" in str(whole.ask(QUESTION, lambda text: None, never))
    assert stopped.ask(QUESTION, pieces.append, lambda: len(pieces) >= 5) == "[stopped]"
    user, assistant = stopped.conversation.messages
    assert user == {"role": "user", "content": QUESTION}
    assert assistant["content"] == "".join(pieces)
    full_text = whole.conversation.messages[1]["content"]
    assert full_text.startswith(assistant["content"]) and len(full_text) > len(assistant["content"])
    assert not llm.engine.has_unfinished
    assert "cut off" in str(stopped.ask("go on", lambda text: None, never))
    assert stopped._last is not None and stopped._last.num_cached_tokens >= 32


def test_an_answer_stopped_before_it_began_leaves_no_trace(llm: LLM) -> None:
    chat_session = session(llm, system="S")
    assert "not kept" in str(chat_session.ask("hello", lambda text: None, lambda: True))
    assert chat_session.conversation.messages == [{"role": "system", "content": "S"}]


@pytest.mark.parametrize("is_stopped", [True, False])
def test_an_interrupt_is_an_end_only_when_asked_for(llm: LLM, is_stopped: bool) -> None:
    chat_session = session(llm)
    pressed: list[int] = []

    def interrupt(text: str) -> None:
        pressed.append(1)
        raise KeyboardInterrupt

    def ask() -> str | None:
        return chat_session.ask("hello", interrupt, lambda: is_stopped and bool(pressed))

    if is_stopped:
        assert ask() == "[stopped]"
    else:
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert len(chat_session.conversation.messages) == (2 if is_stopped else 0)
    assert not llm.engine.has_unfinished


def test_a_template_is_tried_before_anybody_types(llm: LLM) -> None:
    with pytest.raises(FormatError, match="does not parse"):
        session(llm, template="{% if %}")
    with pytest.raises(RequestError, match="no system"):
        session(llm, "S", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")


def test_a_context_that_fills_up_while_answering(llm: LLM) -> None:
    chat_session = session(llm)
    chat_session.set_param("max_tokens", "0")
    note = str(chat_session.ask("hello", lambda text: None, never))
    assert "[cut off: the 128 tokens there is room for are full; /forget 1 drops enough" in note
    with pytest.raises(RequestError, match="/forget 1 drops enough"):
        chat_session.ask("hello", lambda text: None, never)
    assert chat_session.conversation.num_turns == 1
