"""Writes docs/cli.md: what `strop VERB --help` says, whatever the terminal's width.

usage: python scripts/cli_docs.py
"""

from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc, signature
from pathlib import Path

import typer

from strop.cli.main import VERBS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_HEAD = """# The command line

Made by `make docs` from what `strop VERB --help` prints; a test checks that it is current.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(line for verb in VERBS for line in _verb(verb))])


def _verb(verb: str) -> Iterator[str]:
    function = getattr(import_module(f"strop.cli.{verb}"), verb)
    app = typer.Typer(add_completion=False)
    app.command()(function)
    params = typer.main.get_command(app).params
    arguments = [param for param in params if param.param_type_name == "argument"]
    options = [param for param in params if param.param_type_name == "option"]
    defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
    yield f"## strop {verb}\n"
    yield f"`strop {verb} {' '.join(param.name.upper() for param in arguments)} [options]`\n"
    yield cleandoc(function.__doc__) + "\n"
    for param in arguments:
        yield f"- `{param.name.upper()}`: {param.help}"
    yield "\n| option | default | |\n|---|---|---|"
    for param in options:
        yield f"| `{', '.join(param.opts)}` | {_default(defaults[param.name])} | {param.help} |"
    yield ""


def _default(value: object) -> str:
    return "" if value is None or value is False or value == "" else f"`{value}`"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
