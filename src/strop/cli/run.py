"""`strop run MODEL PROMPT`: one streamed answer and a line that says how fast it came."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from strop.cli.answer import Answer, interrupts
from strop.cli.follow import follow, keep_standard_output
from strop.cli.options import (
    engine_config,
    engine_options,
    plan_option,
    process_options,
    read_template_file,
    sampling_options,
    sampling_params,
    template_options,
)
from strop.cli.verb import start_up
from strop.core.errors import RequestError

_START = time.perf_counter()


@click.command("run")
@click.argument("model")
@click.argument("prompt")
@sampling_options(max_tokens=256)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text: no chat template.")
@template_options()
@plan_option()
@engine_options()
@process_options()
@click.option("--json", "json_line", is_flag=True, help="End with one JSON line instead of a summary.")
def command(
    model: str,
    prompt: str,
    raw: bool,
    system: str | None,
    template: Path | None,
    json_line: bool,
    **settings: Any,
) -> None:
    """Answers one prompt.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id: org/name, org/name@revision, or
    org/name:Q4_K_M for one GGUF model of many. PROMPT '-' reads standard input. Text goes to standard output,
    everything else to standard error.
    """
    params, config = sampling_params(settings), engine_config(settings)
    chat_template = read_template_file(template)
    text = _standard_input() if prompt == "-" else prompt
    if raw and (system or template):
        raise RequestError("--raw takes the prompt as it is: drop --system and --template, or --raw")
    if not text:
        raise RequestError("the prompt is empty: give some text, or '-' to read standard input")
    if config.processes is not None:
        keep_standard_output()
        if config.processes.process_id > 0:
            follow(model, config)
            return
    with start_up():
        from strop.engine.loading import load_model
        from strop.engine.text import prepare_prompt

        loaded, config = load_model(
            model, config, on_plan=lambda plan: print(plan.describe(), file=sys.stderr), chat=not raw
        )
        from strop.engine.engine import Engine

        engine = Engine(loaded, config)
    messages = [{"role": "system", "content": system}] if system else []
    is_chat = not raw and (chat_template or engine.tokenizer.chat_template) is not None
    if system and not is_chat:
        raise RequestError("--system needs a chat template, which this model lacks: give one with --template FILE")
    prepared: Any = [*messages, {"role": "user", "content": text}] if is_chat else text
    token_ids = prepare_prompt(
        engine.tokenizer, prepared, vocab_size=engine.spec.vocab_size, chat_template=chat_template
    )
    answer = Answer(engine)
    with interrupts() as is_stopped:
        answer.stream(token_ids, params, _ignore if json_line else _echo, is_stopped)
        if is_stopped():
            raise click.Abort
    if json_line:
        print(json.dumps(_as_json(answer)))
    else:
        print(flush=True)  # before anything on standard error
        print(_summary(answer), file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the prompt on standard input is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def _echo(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


def _summary(answer: Answer) -> str:
    return (
        f"[{answer.speed()}; first token {answer.ttft_s * 1e3:.0f} ms after the prompt, "
        f"{answer.first_s - _START:.2f} s after the start]"
    )


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.num_prompt_tokens,
            "completion_tokens": len(answer.token_ids),
            "total_tokens": answer.num_prompt_tokens + len(answer.token_ids),
        },
        "timings": {
            "start_to_first_token_s": answer.first_s - _START,
            "ttft_s": answer.ttft_s,
            "tokens_per_s": answer.tokens_per_s,
            "total_s": answer.end_s - _START,
        },
    }
