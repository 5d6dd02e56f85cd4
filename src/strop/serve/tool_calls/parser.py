"""A model's text into plain text and tool calls, while it arrives. Pure."""

import secrets
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from typing import Literal

from strop.serve.tool_calls.format import CLOSING, OPENING, ToolFormat
from strop.serve.tool_calls.json_text import (
    SCALAR,
    SCALAR_CHARACTERS,
    SPACE,
    NotJsonError,
    Reader,
    encoded_object_text,
    value_text,
)

_Steps = Generator[None, None, None]
"""Reads characters: each yield is done with `_character` and waits for the next."""

MAX_HELD_CHARACTERS = 64 * 1024
_MARKERS = {"hermes": (OPENING, CLOSING, "<think>"), "llama3": ("<|python_tag|>", "<think>")}
_ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A fragment of a call. The fragments of one call add up to its arguments, as JSON text."""

    index: int
    """Which call of the choice, from 0 on."""
    arguments: str
    id: str | None = None
    """In the first fragment of a call only, like `name`."""
    name: str | None = None


class ToolCallParser:
    """Finds the calls in one choice's text. However the text is cut, the pieces that come out add up to the same.

    - A call begins to come out when its name is known, one of `names`, and its arguments have begun, as an object (or a
      string that holds one; null, "" or none at all count as `{}`); from there on they flow as they come.
    - Text that turns out not to be a call comes out as the text it is: other names, broken JSON, what the end cuts off
      before a call begins to come out. Of a call that breaks later the rest is text, and its arguments stay cut.
    - What the end cuts off of a call that has begun to come out does not come out at all.
    - White space around calls is no text; only what follows a call stays, between text and text.
    - With `parallel=False` nothing comes out after the first call.
    - With `only_calls` there is no text: what the end cuts off is part of a call.
    - With `calls_or_text` an answer that begins as text stays text, and a call's first member is its name.
    - What `<think>` and `</think>` enclose at the start of an answer is text.

    Time is linear in the text, and no more than MAX_HELD_CHARACTERS are held back.
    """

    def __init__(
        self,
        form: ToolFormat,
        names: Collection[str],
        parallel: bool = True,
        *,
        only_calls: bool = False,
        calls_or_text: bool = False,
    ) -> None:
        self.num_calls = 0
        """Calls whose arguments are complete."""
        self._form = form.form
        self._names = frozenset(names)
        self._name_starts = frozenset(name[:end] for name in self._names for end in range(1, len(name) + 1))
        self._parallel = parallel
        self._only_calls = only_calls
        self._calls_or_text = calls_or_text
        self._is_cut = False
        self._character = ""
        """The one to be read, "" at the end of the text."""
        self._held: list[str] = []
        """What was read and has not come out, since it may belong to a call."""
        self._space: list[str] = []
        """White space that comes out if text follows."""
        self._said = False
        self._call: _Call | None = None
        """The one that is being read."""
        self._num_begun = 0
        self._place: Literal["text", "line", "call"] = "line" if self._form == "llama3" else "text"
        """In text only a marker begins a call; at the start of a line an object may; after a call, separators too."""
        self._pieces: list[tuple[_Call | None, list[str]]] = []
        self._steps = self._read_answer()

    @property
    def _finished(self) -> bool:
        return self.num_calls > 0 and not self._parallel

    def push(self, text: str, ended: bool = False, *, cut: bool = False) -> list["str | ToolDelta"]:
        """What `text` makes certain, in order. `ended` with the last text, for what was held back; `cut` if it was not
        the model that ended it: then the beginning of a call is no text."""
        for character in text:
            self._character = character
            next(self._steps)
        if ended:
            self._character, self._is_cut = "", cut
            next(self._steps, None)
        pieces, self._pieces = self._pieces, []
        return ["".join(texts) if call is None else call.fragment("".join(texts)) for call, texts in pieces]

    def _read_answer(self) -> _Steps:
        while self._character:
            try:
                yield from self._read_part()
            except NotJsonError:
                if not self._ends_in_call():
                    self._say("".join(self._held))
                self._held.clear()
                self._call = None
        if not self._num_begun:
            self._come_out(None, "".join(self._space))

    def _ends_in_call(self) -> bool:
        """Whether what is held belongs to a call that the end of the text cut off."""
        if self._character:
            return False
        call = self._call
        if self._only_calls or (call is not None and call.index < self._num_begun):
            return True
        in_mark = self._place == "call" and CLOSING.startswith("".join(self._held))
        return self._is_cut and (in_mark or (call is not None and (call.is_marked or bool(call.name))))

    def _read_part(self) -> _Steps:
        character = self._character
        if self._finished:
            yield
        elif self._calls_or_text and self._said:
            self._say(character)
            yield
        elif character in SPACE:
            self._space.append(character)
            if len(self._space) > MAX_HELD_CHARACTERS:
                self._say("")
            if character == "\n" and self._form == "llama3" and self._place == "text":
                self._place = "line"
            yield
        elif character == "<":
            yield from self._read_marked()
        elif self._place != "text" and character in ("{", "["):
            yield from self._read_calls(is_marked=self._place == "call")
        elif self._place == "call" and character in (",", ";"):
            yield from self._skip(character)
            yield from self._read_calls(is_marked=True)
        elif self._place == "call" and character in ("}", "]"):
            yield
        else:
            self._say(character)
            yield

    def _read_marked(self) -> _Steps:
        """A call after a marker, the marker after a call, or thinking."""
        marker = ""
        while marker not in _MARKERS[self._form]:
            marker += self._character
            if not self._character or not any(known.startswith(marker) for known in _MARKERS[self._form]):
                raise NotJsonError
            self._hold()
            yield
        if marker == "<think>" and not self._said and not self._num_begun:
            yield from self._read_thinking()
        elif marker == CLOSING and self._place == "call":
            self._held.clear()
            self._space.clear()
            self._place = "text"
        elif marker in (OPENING, "<|python_tag|>"):
            yield from self._read_calls(is_marked=True)
        else:
            raise NotJsonError

    def _read_thinking(self) -> _Steps:
        self._say("".join(self._held))
        self._held.clear()
        end = ""
        while self._character and end != "</think>":
            end = (end + self._character)[-len("</think>") :]
            self._say(self._character)
            yield
        if self._form == "llama3":
            self._place = "line"

    def _read_calls(self, is_marked: bool) -> _Steps:
        """A call, the first of a list or alone. `is_marked` if what came before says that it is one."""
        self._call = call = _Call(self._num_begun, is_marked)
        yield from self._skip()
        if self._character == "[":
            yield from self._skip("[")
        yield from self._read_call(call)
        self._call = None

    def _read_call(self, call: "_Call") -> _Steps:
        """An object with a name and arguments in any order; other members are passed over."""
        yield from self._skip("{")
        while True:
            key: list[str] = []
            if self._character != '"':
                raise NotJsonError
            yield from self._read_json(value_text, key.append)
            yield from self._skip()
            yield from self._skip(":")
            name = "".join(key)[1:-1]
            if self._calls_or_text and name != "name" and not call.name:
                raise NotJsonError
            if name == "name" and not call.name:
                call.name = yield from self._read_name()
                self._give_arguments(call)
            elif name in _ARGUMENT_KEYS and not call.has_arguments:
                yield from self._read_arguments(call)
            else:
                yield from self._read_other()
            if call.name and call.has_arguments and not call.complete:
                self._complete(call)
            yield from self._skip()
            if self._character != ",":
                break
            yield from self._skip(",")
        if call.complete:
            self._held.clear()
            return  # a closing brace, if there is one, is passed over with what follows a call
        if self._character != "}" or not call.name:
            raise NotJsonError
        self._hold()
        yield
        self._give_arguments(call, "{}")
        self._complete(call)

    def _complete(self, call: "_Call") -> None:
        call.complete = True
        self.num_calls += 1
        self._place = "call"
        self._held.clear()
        self._space.clear()

    def _read_name(self) -> Generator[None, None, str]:
        yield from self._read_literal('"')
        name = ""
        while self._character != '"':
            name += self._character
            if not self._character or name not in self._name_starts:
                raise NotJsonError
            self._hold()
            yield
        if name not in self._names:
            raise NotJsonError
        self._hold()
        yield
        return name

    def _read_arguments(self, call: "_Call") -> _Steps:
        def give(text: str) -> None:
            self._give_arguments(call, text)

        if self._character == "{":
            yield from self._read_json(value_text, give)
        elif self._character == '"':
            yield from self._read_json(encoded_object_text, give)
        else:
            yield from self._read_literal("null")
            give("{}")
        call.has_arguments = True

    def _give_arguments(self, call: "_Call", text: str = "") -> None:
        """`text` follows in the arguments; they come out once the name is known."""
        call.waiting.append(text)
        if call.name and any(call.waiting):
            self._num_begun = call.index + 1
            self._come_out(call, "".join(call.waiting))
            call.waiting.clear()
            self._held.clear()

    def _read_other(self) -> _Steps:
        if self._character in ("{", "[", '"'):
            yield from self._read_json(value_text, lambda _: None)
            return
        text = ""
        while self._character in SCALAR_CHARACTERS:
            text += self._character
            self._hold()
            yield
        if not SCALAR.fullmatch(text):
            raise NotJsonError

    def _read_json(self, kind: Callable[[list[str]], Reader], give: Callable[[str], None]) -> _Steps:
        """One value; `give` gets what of it is certain."""
        out: list[str] = []
        reader = kind(out)
        next(reader)
        ended = False
        while not ended:
            if not self._character:
                raise NotJsonError
            try:
                reader.send(self._character)
            except StopIteration:
                ended = True
            self._hold()
            if out:
                give("".join(out))
                out.clear()
            yield

    def _read_literal(self, text: str) -> _Steps:
        for character in text:
            if self._character != character:
                raise NotJsonError
            self._hold()
            yield

    def _skip(self, text: str = "") -> _Steps:
        """Reads `text` and the white space after it."""
        yield from self._read_literal(text)
        while self._character in SPACE:
            self._hold()
            yield

    def _hold(self) -> None:
        """Called for each character that is read and does not come out at once, before the yield."""
        if len(self._held) == MAX_HELD_CHARACTERS:
            raise NotJsonError
        self._held.append(self._character)

    def _say(self, text: str) -> None:
        if self._said or not self._num_begun:
            self._come_out(None, "".join(self._space))
        self._space.clear()
        self._come_out(None, text)
        self._said = self._said or bool(text)
        self._place = "text"

    def _come_out(self, call: "_Call | None", text: str) -> None:
        if self._finished or not text:
            return
        if self._pieces and self._pieces[-1][0] is call:
            self._pieces[-1][1].append(text)
        else:
            self._pieces.append((call, [text]))


@dataclass(slots=True, eq=False)
class _Call:
    """A call on its way."""

    index: int
    is_marked: bool
    name: str = ""
    waiting: list[str] = field(default_factory=list)
    """Arguments that came before the name."""
    has_arguments: bool = False
    complete: bool = False
    announced: bool = False

    def fragment(self, arguments: str) -> ToolDelta:
        if self.announced:
            return ToolDelta(self.index, arguments)
        self.announced = True
        return ToolDelta(self.index, arguments, f"call_{secrets.token_hex(12)}", self.name)
