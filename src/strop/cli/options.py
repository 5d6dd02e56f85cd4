"""Options that several verbs share, and the settings they make."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from strop.core.config import GIB, EngineConfig, Processes
from strop.core.errors import RequestError
from strop.core.request import SamplingParams

Function = TypeVar("Function", bound=Callable[..., Any])

_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


def sampling_options(max_tokens: int) -> Callable[[Function], Function]:
    """How to pick tokens: one option per field of SamplingParams; `max_tokens` is that option's default."""
    return _all_of(
        click.option(
            "--max-tokens", default=max_tokens, help="Tokens to generate at most; 0 means up to the context's end."
        ),
        click.option("--temperature", default=0.0, help="0 picks the most probable token."),
        click.option("--top-k", default=0, help="Keep the k most probable tokens; 0 keeps all."),
        click.option("--top-p", default=1.0, help="Keep the smallest set of tokens with this probability."),
        click.option("--min-p", default=0.0, help="Drop tokens below this share of the most probable one."),
        click.option("--seed", type=int, help="Makes a sampled answer repeatable."),
        click.option("--repetition-penalty", default=1.0, help="Above 1 discourages tokens already seen."),
        click.option("--stop", multiple=True, help="Ends the answer before this text; may be repeated."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the end of the answer."),
    )


def sampling_flags(command: click.Command) -> dict[str, click.Option]:
    """The options of `sampling_options` that `command` has, by the field they set."""
    return {
        param.name: param
        for param in command.params
        if isinstance(param, click.Option) and param.name in _SAMPLING_FIELDS
    }


def template_options() -> Callable[[Function], Function]:
    """What messages are put into."""
    return _all_of(
        click.option("--system", help="System message for the chat template."),
        click.option(
            "--template",
            type=click.Path(path_type=Path),
            help="File with the chat template (Jinja), instead of the model's own.",
        ),
    )


def engine_options() -> Callable[[Function], Function]:
    """What the engine may take."""
    return _all_of(
        click.option("--context", default=0, help="Longest prompt + answer in tokens; 0 means the model's limit."),
        click.option(
            "--kv-dtype", type=click.Choice(["bf16", "int8"]), default="bf16", help="How the cache stores numbers."
        ),
        click.option("--memory", default=0.0, help="Memory limit in GiB; 0 means what is available."),
        click.option("--threads", default=0, help="Threads that compute; 0 means the usable cores."),
        click.option("--mesh", default="", help="Devices to partition the model over, such as 8 or 2x4."),
        click.option(
            "--attention", type=click.Choice(["heads", "batch"]), default="heads", help="What of it devices share."
        ),
        click.option(
            "--layout", default="auto", help="How: ws1d, ws2d, wg_x, wg_xy, wg_xyz or dp; auto: as sends least."
        ),
    )


def process_options() -> Callable[[Function], Function]:
    """Which processes make up the engine, where there are several. All are started alike but for --process-id."""
    return _all_of(
        click.option(
            "--coordinator", default="", help="HOST:PORT of the first of several processes that share --mesh."
        ),
        click.option("--num-processes", default=1, help="How many there are."),
        click.option("--process-id", default=0, help="Which one this is: 0 is the first, and answers."),
        click.option(
            "--join-timeout",
            default=120.0,
            type=click.FloatRange(0, min_open=True),
            help="Seconds that they wait for each other at the start.",
        ),
    )


def plan_option() -> Callable[[Function], Function]:
    """`--plan FILE`: its settings become the defaults of the verb's other options."""
    return click.option(
        "--plan",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_take_plan,
        help="File that `strop plan --out` wrote: its limits are taken where no other option says more.",
    )


_OPTION_OF_SETTING = {
    "max_num_seqs": "max_seqs",
    "max_step_tokens": "max_step_tokens",
    "max_chunk_tokens": "max_chunk_tokens",
    "max_context_len": "context",
    "kv_dtype": "kv_dtype",
    "num_threads": "threads",
    "mesh": "mesh",
    "layout": "layout",
    "attention": "attention",
}


def _take_plan(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    from strop.core.plan_file import read_engine_settings

    settings = read_engine_settings(path)
    named = {option: settings[name] for name, option in _OPTION_OF_SETTING.items() if name in settings}
    context.default_map = {**(context.default_map or {}), **named}


def refuse_options(reason: str, *, but: Collection[str] = ()) -> None:
    """Raises RequestError for what stands on the command line and is not one of these parameters."""
    context = click.get_current_context()
    for param in context.command.params:
        name = str(param.name)
        if name not in but and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise RequestError(f"{param.opts[0]} {reason}: leave it out")


def sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    """From the values of `sampling_options`. RequestError for one out of range."""
    chosen = {name: value for name, value in settings.items() if name in _SAMPLING_FIELDS}
    if chosen["max_tokens"] < 0:
        raise RequestError(
            f"max_tokens={chosen['max_tokens']} is out of range: 1 or more, or 0 for up to the context's end"
        )
    return SamplingParams(**(chosen | {"max_tokens": chosen["max_tokens"] or None}))


def engine_config(settings: Mapping[str, Any], max_num_seqs: int = 1) -> EngineConfig:
    """From the values of `engine_options`. RequestError for a limit out of range."""
    memory = settings["memory"]
    if not 0 <= memory < 1e9:
        raise RequestError(f"--memory {memory} is out of range: give GiB, or 0 for what is available")
    return EngineConfig(
        max_num_seqs=max_num_seqs,
        max_context_len=settings["context"],
        kv_dtype=settings["kv_dtype"],
        memory_bytes=int(memory * GIB),
        num_threads=settings["threads"],
        mesh=settings["mesh"],
        layout=settings["layout"],
        attention=settings["attention"],
        processes=_processes(settings),
    )


def _processes(settings: Mapping[str, Any]) -> Processes | None:
    """From the values of `process_options`, if the verb has them."""
    coordinator, num_processes = settings.get("coordinator", ""), settings.get("num_processes", 1)
    if coordinator:
        return Processes(coordinator, num_processes, settings["process_id"], settings["join_timeout"])
    if num_processes != 1 or settings.get("process_id", 0) != 0:
        raise RequestError(
            f"num_processes={num_processes} must know where to meet: give coordinator=HOST:PORT, an address of the"
            " machine of the process with process_id=0"
        )
    return None


def read_template_file(path: Path | None) -> str | None:
    """The chat template in a file the user named, None if none was named. RequestError if it cannot be read."""
    if path is None:
        return None
    from strop.formats.chat_templates import read_template

    try:
        return read_template(path)
    except OSError as error:
        raise RequestError(
            f"--template {path} cannot be read ({error.strerror}): give a file with a chat template"
        ) from None


def _all_of(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add
