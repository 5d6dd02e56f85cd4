"""The process that renders chat templates: a template is a program by a stranger, so it runs where it can be killed.

Imports jinja2 and msgspec and little of ours, so that it starts in a tenth of a second.
"""

import functools
import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.debug
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from strop.formats.helper_worker import failure, serve


class OutputTooLongError(Exception):
    """The rendered text passed its limit."""


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training masks; rendering passes its body through."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The nodes between the tags, with names of their own, as in transformers."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(jinja2.utils.Namespace):
    """What a template may change, but not into something Python takes for more than it is."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` too is a name a template may use
        self, *given = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: Any) -> NoReturn:
    """How a template refuses messages."""
    raise jinja2.exceptions.TemplateRuntimeError(str(message))


def strftime_now(format: str) -> str:
    """The local time in `format`."""
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes `<`, `>` and `&` for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox with what Hugging Face templates may expect."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    env.globals["namespace"] = Namespace
    del env.globals["lipsum"]
    return env


@functools.lru_cache(maxsize=4)
def compiled(env: jinja2.Environment, source: str) -> jinja2.Template:
    """The template in `source`: every turn of a chat renders the same one."""
    return env.from_string(source)


def render(env: jinja2.Environment, source: str, variables: dict[str, Any], max_output_bytes: int) -> bytes:
    """The rendered text as UTF-8 (lone surrogates passed on), at most `max_output_bytes` long."""
    pieces: list[bytes] = []
    num_bytes = 0
    for piece in compiled(env, source).generate(variables):
        data = piece.encode("utf-8", "surrogatepass")
        num_bytes += len(data)
        if num_bytes > max_output_bytes:
            raise OutputTooLongError(f"its output is longer than {max_output_bytes} bytes")
        pieces.append(data)
    return b"".join(pieces)


def answer(env: jinja2.Environment, request: dict[str, Any]) -> dict[str, Any]:
    """{"text": bytes} or {"error": kind, "message": str}; never raises an Exception."""
    try:
        return {"text": render(env, request["template"], request["variables"], request["max_output_bytes"])}
    except jinja2.TemplateSyntaxError as error:
        return failure("syntax", f"line {error.lineno}: {error.message}")
    except jinja2.exceptions.SecurityError as error:
        return failure("unsafe", str(error))
    except OutputTooLongError as error:
        return failure("too_long", str(error))
    except MemoryError:
        return failure("memory", "it needs too much memory")
    except RecursionError:
        return failure("recursion", "it is nested or recurses too deeply")
    except jinja2.TemplateError as error:
        return failure("template", str(error.message or error))
    except Exception as error:
        return failure("runtime", f"{type(error).__name__}: {error}")


def main() -> None:
    """Answer requests until stdin ends."""
    env = environment()
    # What jinja imports when it is first used must be there before this process can open no file and no socket more.
    used = "{{ 'x' | wordwrap | pprint | striptags ~ strftime_now('%c') }}{{ 1 / 0 }}"
    answer(env, {"template": used, "variables": {}, "max_output_bytes": 100})
    serve(functools.partial(answer, env))


if __name__ == "__main__":
    main()
