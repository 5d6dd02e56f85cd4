"""Lines in, text out: for a person at a terminal, or for a pipe, which sees answers and nothing else."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from strop.cli.answer import interrupts
from strop.core.errors import RequestError
from strop.formats.template import replace_surrogates

_DIM, _RED, _PLAIN = "\033[2m", "\033[31m", "\033[0m"

# What a model writes must not move the cursor, name the window or fill the clipboard.
_CONTROLS = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"}


class Terminal:
    """Standard input, output and error. Notes and errors go to standard error."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        """Whether a person types: then there is a prompt, and Ctrl-C is for the answer, not the program."""
        self._shows_answers = sys.stdout.isatty()
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._colors = not plain and sys.stderr.isatty()
        self._edits_lines = self.is_interactive and self._shows_answers
        self._text_typed: Callable[[], str] = str

    def lines(self, completions: Iterable[str] = ()) -> Iterator[str]:
        """Lines without their end, blank ones left out, until the input ends. `completions` are for the Tab key.

        RequestError for a line that is not UTF-8.
        """
        if self._edits_lines:
            self._text_typed = _edit_lines(sorted(completions))
        typed = self._typed() if self.is_interactive else _piped()
        return (replace_surrogates(line) for line in typed if line.strip())

    def write(self, text: str) -> None:
        """A piece of an answer."""
        print(text.translate(_CONTROLS) if self._shows_answers else text, end="", flush=True)

    def note(self, text: str) -> None:
        """What is no part of an answer."""
        self._say(text, _DIM)

    def error(self, text: str) -> None:
        """What went wrong; the chat goes on."""
        self._say(f"strop: {text}", _RED)

    @contextmanager
    def interrupts(self) -> Iterator[Callable[[], bool]]:
        """At a terminal, see `interrupts`; in a pipe Ctrl-C ends the chat at once."""
        if not self.is_interactive:
            yield lambda: False
            return
        with interrupts() as is_pressed:
            yield is_pressed

    def _say(self, text: str, color: str) -> None:
        print(f"{color}{text}{_PLAIN}" if self._colors else text, file=sys.stderr, flush=True)

    def _typed(self) -> Iterator[str]:
        """Ctrl-C drops the line; at an empty one, twice in a row, it leaves, as Ctrl-D does."""
        interrupted = False
        while True:
            try:
                line = self._read()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                dropped = self._text_typed()
                if interrupted and not dropped:
                    return
                interrupted = not dropped
                if interrupted:
                    self.note("(Ctrl-C again, or Ctrl-D, leaves)")
                continue
            except UnicodeDecodeError:
                self.error("that line is not UTF-8: set the terminal to it")
                continue
            interrupted = False
            yield line

    def _read(self) -> str:
        if self._edits_lines:
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


def _piped() -> Iterator[str]:
    for number, data in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"line {number} of standard input is not UTF-8 ({error.reason} at byte {error.start})"
            ) from None


def _edit_lines(words: list[str]) -> Callable[[], str]:
    """Line editing and history, if this Python has them, and words for the Tab key at the line's beginning.

    Returns what tells the text that is being typed.
    """
    try:
        import readline
    except ImportError:
        return str

    def complete(text: str, state: int) -> str | None:
        return ([word for word in words if readline.get_begidx() == 0 and word.startswith(text)] + [None])[state]

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    return readline.get_line_buffer
