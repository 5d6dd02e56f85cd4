"""Runs one verb, and says what went wrong in the words of its command line."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from strop.core.errors import CapacityError, RequestError, StropError

# Options that are not called like the setting they change; the others differ only in dashes.
_OPTION_OF_FIELD = {
    "max_context_len": "context",
    "memory_bytes": "memory",
    "num_threads": "threads",
    "max_num_seqs": "batches",
}


def run_verb(verb: Callable[..., None], arguments: list[str]) -> None:
    """Parses and runs; an error a user can act on becomes one line on standard error and exit code 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(verb)
    try:
        app(arguments, prog_name=f"strop {verb.__name__}")
    except StropError as error:
        message = str(error)
        if isinstance(error, RequestError | CapacityError):  # others speak of what stands in a file
            message = in_flags(message, flags_of(app))
        print(f"strop: {message}", file=sys.stderr)
        sys.exit(1)


def flags_of(app: typer.Typer) -> dict[str, str]:
    """Field of SamplingParams or EngineConfig -> the flag that sets it, for the app's only command."""
    command: Any = typer.main.get_command(app)
    flags = {param.name: param.opts[0] for param in command.params if param.param_type_name == "option"}
    renamed = {field: flags[option] for field, option in _OPTION_OF_FIELD.items() if option in flags}
    return flags | renamed


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """`message` with `max_context_len=8` as `--context 8`, and so on. Names in quotes and paths stay as they are."""

    def flag(match: re.Match[str]) -> str:
        name, equals = match[1], match[2]
        if not equals and "_" not in name:  # a word of the language, such as "memory"
            return match[0]
        return flags[name] + (" " if equals else "")

    names = "|".join(flags)
    return re.sub(rf"(?<![\w./'\"-])({names})(?:(?:\[\d+\])?(=)|(?![\w/'\"=-]|\.\w))", flag, message)
