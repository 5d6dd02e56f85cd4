"""The process that renders chat templates: a template is a program by a stranger, so it runs where it can be killed.

Reads framed msgpack from stdin, writes framed msgpack to stdout (four bytes of length, little-endian, then the body).
Imports jinja2 and msgspec and nothing of ours, so that it starts in a tenth of a second.
"""

import functools
import json
import os
import resource
import sys
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
import msgspec

MAX_MESSAGE_CHARS = 500


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


def failure(kind: str, message: str) -> dict[str, Any]:
    """An error reply; `message` cut to a readable length."""
    printable = message.encode("utf-8", "backslashreplace").decode()
    return {"error": kind, "message": printable[:MAX_MESSAGE_CHARS]}


def read_exactly(num_bytes: int) -> bytes:
    """Bytes from stdin; ends the process when the parent has gone."""
    data = sys.stdin.buffer.read(num_bytes)
    if len(data) < num_bytes:
        sys.exit(0)
    return data


def write_frame(message: dict[str, Any]) -> None:
    """Send one message to the parent."""
    body = msgspec.msgpack.encode(message)
    sys.stdout.buffer.write(len(body).to_bytes(4, "little"))
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()


def limit(kind: int, soft: int) -> None:
    """Set a soft resource limit, within the hard one."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """Answer requests until stdin ends. Arguments: memory limit in bytes, processor time per request in seconds."""
    memory_bytes, cpu_s = (int(argument) for argument in sys.argv[1:3])
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    env = environment()
    # What jinja imports when it is first used must be there before this process can open no file and no socket more.
    used = "{{ 'x' | wordwrap | pprint | striptags ~ strftime_now('%c') }}{{ 1 / 0 }}"
    answer(env, {"template": used, "variables": {}, "max_output_bytes": 100})
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    write_frame({"ready": True})
    while True:
        body = read_exactly(int.from_bytes(read_exactly(4), "little"))
        # If the parent is killed while a template loops, nobody is left to stop this process but the kernel.
        limit(resource.RLIMIT_CPU, int(sum(os.times()[:2])) + cpu_s)
        write_frame(answer(env, msgspec.msgpack.decode(body)))


if __name__ == "__main__":
    main()
