"""`strop serve MODEL`: an OpenAI-compatible server."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from strop.cli.follow import follow
from strop.cli.options import engine_config, engine_options, plan_option, process_options, read_template_file
from strop.cli.verb import start_up

if TYPE_CHECKING:
    from strop.engine.messages import ModelFacts

_START = time.perf_counter()


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--name", "names", multiple=True, help="What requests call the model; may be repeated.")
@click.option(
    "--api-keys", type=click.Path(path_type=Path), help="File of keys (see `strop keys`); asked of everybody."
)
@click.option("--cors-origin", "cors_origins", multiple=True, help="Web origin whose pages may call; may be repeated.")
@click.option(
    "--runner",
    type=click.Choice(["auto", "generate", "pooling"]),
    default="auto",
    help="Write answers, or make vectors; auto: vectors if the model is an encoder.",
)
@click.option("--max-seqs", type=click.IntRange(1), help="Sequences in one step; else by this machine's plan.")
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    help="Of one step, prompts and answers together; else by this machine's plan.",
)
@click.option(
    "--max-chunk-tokens",
    type=click.IntRange(1),
    help="Of prompts, in a step that also continues answers: fewer hold these up less, and take prompts in slower; else"
    " by this machine's plan.",
)
@click.option(
    "--max-queue", type=click.IntRange(1), help="Requests that may wait, more get a 429; else a minute's work."
)
@click.option("--max-queue-tokens", type=click.IntRange(1), help="Prompt tokens that may wait; else a minute's work.")
@click.option("--timeout", default=600.0, type=click.FloatRange(1), help="Seconds that a request may take.")
@click.option("--drain", default=30.0, type=click.FloatRange(1), help="Seconds for open requests on SIGTERM.")
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of this machine: cost per request in /metrics.")
@click.option(
    "--template", type=click.Path(path_type=Path), help="File with the chat template, instead of the model's."
)
@click.option("--keep-thoughts", is_flag=True, help="Leave <think> in answers; else it becomes reasoning_content.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="Of the lines on standard error."
)
@plan_option()
@engine_options()
@process_options()
def command(
    model: str,
    names: tuple[str, ...],
    max_seqs: int | None,
    max_step_tokens: int | None,
    max_chunk_tokens: int | None,
    template: Path | None,
    log_format: str,
    **settings: Any,
) -> None:
    """Serves a model to OpenAI's clients.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. Listens on this machine only, unless
    --host says otherwise. SIGTERM and Ctrl-C let the requests at hand end. /metrics is for Prometheus, /readyz says
    whether the model makes progress, and the page at / is a chat.
    """
    chat_template = read_template_file(template)
    config = replace(
        engine_config(settings, max_num_seqs=max_seqs or 0),
        max_step_tokens=max_step_tokens or 0,
        max_chunk_tokens=max_chunk_tokens or 0,
    )
    if config.processes is not None and config.processes.process_id > 0:
        follow(model, config)
        return
    with start_up():
        from strop.engine.loading import load_text_side
        from strop.serve.logs import set_up_logs
        from strop.serve.server import serve
        from strop.serve.settings import ServeConfig

        set_up_logs(log_format)
        serve_config = ServeConfig(
            model_names=names or (default_name(model),),
            host=settings["host"],
            port=settings["port"],
            api_keys=settings["api_keys"],
            cors_origins=settings["cors_origins"],
            max_queued_requests=settings["max_queue"] or 0,
            max_queued_tokens=settings["max_queue_tokens"] or 0,
            request_timeout_s=settings["timeout"],
            drain_s=settings["drain"],
            price_per_hour=settings["price_per_hour"],
            runner=settings["runner"],
            splits_thoughts=not settings["keep_thoughts"],
        )
        tokenizer = load_text_side(model, chat_template)
    serve(
        model,
        tokenizer,
        serve_config,
        config,
        on_listen=lambda url: print(
            f"{url}  (loading {model}, which requests call {' or '.join(serve_config.model_names)})",
            file=sys.stderr,
            flush=True,
        ),
        on_load=_report,
    )


def _report(facts: "ModelFacts") -> None:
    lines = [facts.memory] + ([] if facts.expected is None else [facts.expected.words])
    print(*lines, f"ready after {time.perf_counter() - _START:.2f} s", sep="\n", file=sys.stderr, flush=True)


def default_name(model: str) -> str:
    """A file's name without its ending, a folder's name, or the Hub id."""
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.exists() else model
