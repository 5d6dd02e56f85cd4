"""`strop chat MODEL`: a conversation, in a terminal or through a pipe."""

import sys
from pathlib import Path
from typing import Any

import click

from strop.cli.chat_commands import COMMANDS, run_command
from strop.cli.chat_session import ChatSession
from strop.cli.options import (
    engine_config,
    engine_options,
    plan_option,
    read_template_file,
    sampling_flags,
    sampling_options,
    sampling_params,
    template_options,
)
from strop.cli.terminal import Terminal
from strop.cli.verb import flags_of, in_flags, start_up
from strop.core.errors import StropError


@click.command("chat")
@click.argument("model")
@sampling_options(max_tokens=0)
@template_options()
@plan_option()
@engine_options()
def command(model: str, system: str | None, template: Path | None, **settings: Any) -> None:
    """Answers line by line and remembers what was said.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. In a terminal, Ctrl-C stops an answer
    and keeps the chat; Ctrl-D, or Ctrl-C twice at the prompt, leaves; /help lists the commands. Through a pipe, each
    line is a turn; only answers go to standard output, and the exit code is 1 if a line could not be answered. A chat
    that outgrows the context is never cut silently: the message is refused, and /forget N makes room.
    """
    sampling_params(settings)
    config, chat_template = engine_config(settings), read_template_file(template)
    terminal = Terminal()
    with start_up():
        from strop.engine.loading import load_model

        loaded, config = load_model(
            model, config, on_plan=lambda plan: print(plan.describe(), file=sys.stderr), chat=True
        )
        from strop.engine.engine import Engine

        session = ChatSession(
            Engine(loaded, config),
            Path(model).name.removesuffix(".gguf"),
            system=system,
            chat_template=chat_template,
            settings=settings,
            options=sampling_flags(command),
        )
    if terminal.is_interactive:
        terminal.note(
            f"{session.model_name}: room for {session.max_tokens} tokens. /help lists commands, Ctrl-D leaves"
        )
    num_failed = 0
    for line in terminal.lines(COMMANDS):
        try:
            _take(session, terminal, line)
        except StropError as error:
            num_failed += 1
            terminal.error(_in_words_of_chat(str(error)))
        except KeyboardInterrupt:  # of a command; an answer only stops
            if not terminal.is_interactive:
                raise
            terminal.note("[interrupted]")
    if num_failed and not terminal.is_interactive:
        sys.exit(1)


def _take(session: ChatSession, terminal: Terminal, line: str) -> None:
    if line.startswith("/") and not line.startswith("//"):
        terminal.note(run_command(session, line))
        return
    message = line[1:] if line.startswith("//") else line
    written = False

    def write(text: str) -> None:
        nonlocal written
        written = True
        terminal.write(text)

    with terminal.interrupts() as is_stopped:
        try:
            note = session.ask(message, write, is_stopped)
        finally:
            if written:
                terminal.write("\n")
    if note is not None:
        terminal.note(note)


def _in_words_of_chat(message: str) -> str:
    """Settings of the engine are flags; parameters keep the names that /params takes."""
    names = sampling_flags(command)
    return in_flags(message, {name: flag for name, flag in flags_of(command).items() if name not in names})
