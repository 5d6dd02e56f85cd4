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
    command = import_module(f"strop.cli.{verb}").command
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    yield f"## strop {verb}\n"
    yield f"`strop {verb} {' '.join(param.name.upper() for param in arguments)} [options]`\n"
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
