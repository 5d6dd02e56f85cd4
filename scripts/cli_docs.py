"""Writes docs/cli.md: what `strop VERB --help` says, whatever the terminal's width.

usage: python scripts/cli_docs.py
"""

from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import click

from strop.cli.main import VERBS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_HEAD = """# The command line

Made by `make docs` from what `strop VERB --help` prints; a test checks that it is current.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(line for verb in VERBS for line in _verb(verb))])


def _verb(verb: str) -> Iterator[str]:
    command = import_module(f"strop.cli.{verb.replace(' ', '_')}").command
    yield from _command(verb, command)
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _command(f"{verb} {name}", subcommand)


def _command(name: str, command: click.Command) -> Iterator[str]:
    arguments = [f"{param.name.upper()} " for param in command.params if isinstance(param, click.Argument)]
    yield f"## strop {name}\n"
    yield f"`strop {name} {''.join(arguments)}[options]`\n"
    yield cleandoc(command.help) + "\n"
    yield "| option | default | |\n|---|---|---|"
    for param in command.params:
        if isinstance(param, click.Option):
            yield f"| `{param.opts[0]}` | {_default(param.default)} | {param.help} |"
    yield ""


def _default(value: object) -> str:
    return f"`{value}`" if isinstance(value, str | int | float) and value is not False and value != "" else ""


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
