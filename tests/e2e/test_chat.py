"""`strop chat` as people meet it: typed into a terminal, and through pipes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_llm import tiny_llm
from tiny_tokenizer import TEMPLATE

Result = subprocess.CompletedProcess[str]
Strop = Callable[..., Result]
CleanError = Callable[..., None]

# jax warns of any fork once it has run in this process; a child that execs at once is safe.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

PROMPT = "> "


class Typist:
    """A person at a terminal of the program's own."""

    def __init__(self, environment: dict[str, str], *arguments: object) -> None:
        code = "from strop.cli.main import main; main()"
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that they ignore Ctrl-C
            os.execve(sys.executable, [sys.executable, "-c", code, *map(str, arguments)], environment)

    def see(self, mark: str, limit_s: float = 120) -> str:
        """What the screen shows up to `mark`."""
        shown, deadline = b"", time.monotonic() + limit_s
        while not shown.endswith(mark.encode()):
            assert select.select([self._terminal], [], [], deadline - time.monotonic())[0], shown
            shown += os.read(self._terminal, 1)
        return shown.decode().replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def ask(self, line: str) -> str:
        """What the screen shows between a line and the next prompt."""
        self.type(line + "\n")
        return self.see(PROMPT).removesuffix(PROMPT)

    def exit_code(self) -> int:
        """Waits for the end, reading on: a program that cannot write does not end."""
        while True:
            try:
                if not os.read(self._terminal, 4096):
                    break
            except OSError:  # how Linux says that nobody has the terminal open any more
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._terminal)


@pytest.fixture
def typist(environment: dict[str, str]) -> Iterator[Callable[..., Typist]]:
    started: list[Typist] = []

    def start(*arguments: object) -> Typist:
        started.append(Typist(environment | {"TERM": "xterm", "NO_COLOR": "1"}, "chat", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_chat_at_a_terminal(typist: Callable[..., Typist], smollm2_path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    user = typist(smollm2_path, "--system", "You are a storyteller.", "--max-tokens", 2000, "--context", 4096)
    assert "/help lists commands" in user.see(PROMPT)

    user.type("Tell me a very long story about a river.\n")
    user.see("river.\r\n")
    begun = user.see(" ") + user.see(" ") + user.see(" ")
    user.type("\x03")
    stopped = begun + user.see(PROMPT)
    assert "[stopped]" in stopped
    answer = stopped.split("\n[stopped]")[0].replace("^C", "")

    user.ask("/params max_tokens=8")
    second = user.ask("What is it about?")
    assert "[cut off: max_tokens=8" in second
    stats = user.ask("/stats")
    assert "last answer: 8 tokens" in stats and "chat: 2 turns" in stats
    reused = int(stats.split(" of them reused")[0].rsplit(" ", 1)[1])
    assert reused >= 32  # the first turn was not computed again

    user.type("/sa\t")
    assert "saved 5 messages" in user.ask(f" {saved}")
    roles, texts = zip(*((m["role"], m["content"]) for m in json.loads(saved.read_text())["messages"]), strict=True)
    assert roles == ("system", "user", "assistant", "user", "assistant")
    assert texts[2] == answer
    assert texts[4] == second.split("\n")[1]

    user.type("half a line")
    user.see("half a line")  # the terminal itself drops what nobody has read yet
    user.type("\x03")
    assert "again" not in user.see(PROMPT)
    user.type("\x03")
    assert "(Ctrl-C again, or Ctrl-D, leaves)" in user.see(PROMPT)
    assert "dropped 1 turns; 1 are left" in user.ask("/forget 1")
    user.type("\x03")
    user.see(PROMPT)
    user.type("\x03")
    assert user.exit_code() == 0


def test_the_end_of_input_leaves_and_a_loaded_chat_goes_on(
    typist: Callable[..., Typist], tiny: Path, tmp_path: Path
) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]')
    user = typist(tiny, "--max-tokens", 4, "--ignore-eos")
    user.see(PROMPT)
    assert "loaded 2 messages" in user.ask(f"/load {chat}")
    assert "strop: " in user.ask(f"/load {tmp_path}")
    assert "cut off" in user.ask("hello")
    assert "chat: 2 turns" in user.ask("/stats")
    user.type("\x04")
    assert user.exit_code() == 0


def test_one_line_in_one_answer_out(strop: Strop, tiny: Path) -> None:
    options = ("--max-tokens", 6, "--ignore-eos", "--stop", "\n")
    piped = strop("chat", tiny, *options, stdin="hello\n\n/stats\n//world\r\nlast")
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
    assert PROMPT not in piped.stdout
    answers = piped.stdout.split("\n")
    assert len(answers) == 4 and answers[3] == ""
    assert "chat: 1 turns" in piped.stderr
    alone = strop("run", tiny, "hello", *options)
    assert alone.stdout == answers[0] + "\n"
    assert strop("chat", tiny, *options, stdin="").stdout == ""


def test_a_chat_that_outgrows_its_context_says_so(strop: Strop, tiny: Path) -> None:
    word = "hello world hello world"  # each turn takes 33 tokens or more of the 127
    lines = [word] * 4 + ["/forget 2", word, word * 99]
    options = ("--context", 127, "--max-tokens", 4, "--ignore-eos", "--stop", "\n")
    piped = strop("chat", tiny, *options, stdin="\n".join(lines))
    refusals = [line for line in piped.stderr.splitlines() if line.startswith("strop: the chat would be ")]
    assert len(refusals) == 2, piped.stderr
    assert "room for 127" in refusals[0] and "/forget 2 drops enough of the oldest turns (3 in all)" in refusals[0]
    assert "shorten it, or start again with a larger --context" in refusals[1]
    assert piped.returncode == 1
    assert piped.stdout.count("\n") == 4


def test_parameters_and_commands_that_are_wrong_change_nothing(strop: Strop, tiny: Path) -> None:
    wrong = ["/params top_p=2", "/params top_p=x", "/params nope=1", "/params top_p", "/nope", "/forget x", "/save"]
    right = ["/params stop=zz", "/params seed=5", "/params seed=", "/params", "/system Be brief.", "/system -", "/help"]
    piped = strop("chat", tiny, stdin="\n".join([*wrong, *right]))
    assert (piped.returncode, piped.stdout) == (1, "")
    assert piped.stderr.count("strop: ") == len(wrong)
    for said in ("top_p=2.0 is out of range", "top_p=x is not", "temperature, top_k", "name=value", "/params, /stats"):
        assert said in piped.stderr
    assert "top_p=1.0\nmin_p=0.0\nseed=\n" in piped.stderr and "stop=zz" in piped.stderr
    assert "system: Be brief.\nno system message of yours\n" in piped.stderr


def test_templates_that_are_missing_given_or_hostile(strop: Strop, clean_error: CleanError, tmp_path: Path) -> None:
    model, template = tmp_path / "bare.gguf", tmp_path / "chat.jinja"
    bare = tiny_llm()
    bare.metadata = [entry for entry in bare.metadata if entry[0] != "tokenizer.chat_template"]
    model.write_bytes(bare.build())
    clean_error(strop("chat", model, stdin="hello"), "no chat template", "--template FILE")
    clean_error(strop("run", model, "hello", "--system", "x"), "--template FILE")

    template.write_text(TEMPLATE)
    options = ("--max-tokens", 6, "--ignore-eos", "--template", template)
    given = strop("run", model, "hello", *options)
    assert given.returncode == 0, given.stderr
    template.write_text("{% if messages[-1].content == 'grow' %}{{ 'a' * 10**9 }}{% endif %}" + TEMPLATE)
    chat = strop("chat", model, *options, stdin="grow\nhello\n")
    assert "too much memory" in chat.stderr
    assert (chat.returncode, chat.stdout) == (1, given.stdout)


def test_lines_that_are_not_text(start: Callable[..., subprocess.Popen[str]], tiny: Path) -> None:
    with start("chat", tiny, "--max-tokens", 2) as process:
        process.stdin.buffer.write(b"hello\n\xff\n")  # type: ignore[union-attr]
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "line 2 of standard input is not UTF-8" in err.splitlines()[-1]
