"""Runs one verb, and says what went wrong in the words of its command line."""

import gc
import io
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click

from strop.core.errors import CapacityError, RequestError, StropError

# Options that are not called like the setting they change; the others differ only in dashes.
_OPTIONS_OF_FIELD = {
    "max_context_len": ("context",),
    "memory_bytes": ("memory",),
    "num_threads": ("threads",),
    "max_num_seqs": ("max_seqs", "batches"),
}


def run_verb(command: click.Command, arguments: list[str]) -> None:
    """Parses and runs; an error a user can act on becomes one line on standard error and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write what some terminals cannot show
    try:
        command.main(arguments, prog_name=f"strop {command.name}", show_default=True, max_content_width=120)
    except StropError as error:
        message = str(error)
        if isinstance(error, RequestError | CapacityError):  # others speak of what stands in a file
            message = in_flags(message, flags_of(command))
        print(f"strop: {message}", file=sys.stderr)
        sys.exit(1)


def flags_of(command: click.Command) -> dict[str, str]:
    """Field of SamplingParams or EngineConfig -> the flag that sets it."""
    flags = {param.name: param.opts[0] for param in command.params if isinstance(param, click.Option) and param.name}
    renamed = {field: flags[one] for field, options in _OPTIONS_OF_FIELD.items() for one in options if one in flags}
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


@contextmanager
def start_up() -> Iterator[None]:
    """Modules and models stay for good: no search for garbage while they load, and none in them later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
