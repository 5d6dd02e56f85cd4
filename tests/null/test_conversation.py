"""Messages of a chat: turns to forget, files to keep them in, and files that hold something else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from strop.cli.conversation import Conversation
from strop.core.errors import RequestError

TURNS = [{"role": role, "content": f"{role} {i} é 😀"} for i in range(3) for role in ("user", "assistant")]


def conversation(system: str | None = "S") -> Conversation:
    made = Conversation(system)
    made.messages += TURNS
    return made


def test_forgetting_keeps_the_system_message_and_the_newest_turns() -> None:
    chat = conversation()
    assert (chat.num_turns, chat.forget(0), chat.num_turns) == (3, 0, 3)
    assert chat.after_forgetting(1) == [{"role": "system", "content": "S"}, *TURNS[2:]]
    assert (chat.forget(1), chat.messages) == (1, [{"role": "system", "content": "S"}, *TURNS[2:]])
    assert (chat.forget(9), chat.messages) == (2, [{"role": "system", "content": "S"}])
    assert (chat.forget(9), chat.num_turns) == (0, 0)


def test_a_turn_goes_up_to_the_next_word_of_the_user() -> None:
    chat = Conversation()
    roles = ["assistant", "user", "assistant", "tool", "assistant", "user", "assistant"]
    chat.messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert [message["content"] for message in chat.after_forgetting(1)] == ["5", "6"]


def test_the_system_message_is_set_replaced_and_removed() -> None:
    chat = conversation(None)
    assert (chat.system, chat.messages) == (None, TURNS)
    for text in ("A", "B"):
        chat.system = text
        assert (chat.system, chat.messages) == (text, [{"role": "system", "content": text}, *TURNS])
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "B"}]
    chat.system = None
    assert chat.messages == []


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation().save(path, "model")
    assert json.loads(path.read_text()) == {"model": "model", "messages": conversation().messages}
    for content in (path.read_text(), json.dumps(conversation().messages)):
        path.write_text(content)
        chat = Conversation("other")
        chat.load(path)
        assert chat.messages == conversation().messages
    assert os.listdir(tmp_path) == ["chat.json"]


def test_what_clients_of_the_api_write_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path.write_text(json.dumps([{"role": "user", "content": parts}, call]))
    chat = Conversation()
    chat.load(path)
    assert chat.messages == [{"role": "user", "content": "ab"}, call]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"chat\.json cannot be written \(No space left"):
        conversation().save(path, "model")
    assert (os.listdir(tmp_path), path.read_text()) == (["chat.json"], "old")
    for impossible in (tmp_path / "none" / "chat.json", tmp_path):
        with pytest.raises(RequestError, match="cannot be written"):
            conversation().save(impossible, "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"5", "holds no chat"),
        (b'{"message": []}', "holds no chat"),
        ([5], "message 0 is 5"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "message 1 has role=None"),
        ([{"role": "robot", "content": "x"}], "message 0 has role='robot': one of system, "),
        ([{"role": ["user"], "content": "x"}], "message 0 has role="),
        ([{"role": "user"}], "message 0 has content=None"),
        ([{"role": "user", "content": {"text": "x"}}], "message 0 has content="),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has the part"),
    ],
)
def test_files_that_hold_no_chat_change_nothing(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat = conversation()
    with pytest.raises(RequestError, match=message):
        chat.load(path)
    assert chat.messages == conversation().messages
