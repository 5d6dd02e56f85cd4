"""The messages of a chat, in OpenAI's form, and the files they are kept in."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from strop.core.config import MIB
from strop.core.errors import RequestError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SYSTEM_ROLES = ("system", "developer")
MAX_FILE_BYTES = 64 * MIB


class Conversation:
    """System messages, then turns: each from one message of the user to the next."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self.system = system

    @property
    def system(self) -> str | None:
        """The system messages' text; setting it replaces them, None or "" removes them."""
        texts = [message["content"] for message in self.messages[: self._num_system]]
        return "\n\n".join(texts) or None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages[: self._num_system] = [{"role": "system", "content": text}] if text else []

    @property
    def num_turns(self) -> int:
        """How often the user has spoken."""
        return len(self._turn_starts)

    def after_forgetting(self, num_turns: int) -> list[Message]:
        """The messages without the `num_turns` oldest turns: what the system says, and the newest turns."""
        starts = [*self._turn_starts, len(self.messages)]
        return self.messages[: self._num_system] + self.messages[starts[min(num_turns, len(starts) - 1)] :]

    def forget(self, num_turns: int) -> int:
        """Drops the oldest turns; returns how many there were to drop."""
        dropped = min(num_turns, self.num_turns)
        self.messages = self.after_forgetting(dropped) if dropped else self.messages
        return dropped

    def reset(self) -> None:
        """Drops everything but the system message."""
        del self.messages[self._num_system :]

    def save(self, path: Path, model: str) -> None:
        """Writes {"model": ..., "messages": [...]}; the file is complete or unchanged. RequestError if impossible."""
        text = json.dumps({"model": model, "messages": self.messages}, ensure_ascii=False, indent=1)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RequestError(
                f"{path} cannot be written ({error.strerror}): name a file in a folder of yours"
            ) from None

    def load(self, path: Path) -> None:
        """Takes a file's messages: what `save` wrote, or the list alone. RequestError, and no change, if damaged."""
        self.messages = read_messages(path)

    @property
    def _num_system(self) -> int:
        roles = [message["role"] in _SYSTEM_ROLES for message in self.messages]
        return roles.index(False) if False in roles else len(roles)

    @property
    def _turn_starts(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]


def read_messages(path: Path) -> list[Message]:
    """The messages in a file. RequestError that names what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}): name a file that /save wrote") from None
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"{path} is larger than {MAX_FILE_BYTES} bytes: name a file that /save wrote")
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON ({error}): name a file that /save wrote") from None
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list):
        raise RequestError(f'{path} holds no chat: a list of messages, or {{"messages": [...]}}, is accepted')
    return [_checked(message, f"{path}: message {i}") for i, message in enumerate(messages)]


def _checked(message: Any, where: str) -> Message:
    """The message with its content as one text."""
    if not isinstance(message, dict):
        raise RequestError(
            f'{where} is {message!r:.80}: an object like {{"role": "user", "content": "..."}} is accepted'
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where} has role={role!r:.80}: one of {', '.join(ROLES)} is accepted")
    if isinstance(content, list):  # parts, as clients of the API write them
        content = "".join(_text_of_part(part, where) for part in content)
    if content is None and role == "assistant" and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise RequestError(f"{where} has content={content!r:.80}: a text is accepted")
    return message | {"content": content}


def _text_of_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RequestError(f'{where} has the part {part!r:.80}: only {{"type": "text", "text": "..."}} is accepted')
    return text
