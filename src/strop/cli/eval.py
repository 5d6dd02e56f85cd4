"""`strop eval MODEL`: perplexity, and the distance from a reference model."""

import json
import sys
from pathlib import Path

import click

from strop.core.errors import RequestError


@click.command("eval")
@click.argument("model")
@click.option("--reference", help="Compare with this model of the same vocabulary, run in float32.")
@click.option(
    "--text", "text_file", help="UTF-8 file to measure on, '-' for standard input; built-in English if not given."
)
@click.option("--windows", default=9, help="Windows of the text to measure, from its beginning.")
@click.option("--window-tokens", default=512, help="Tokens per window, at most the model's context.")
@click.option("--generated", is_flag=True, help="Score tokens one per step, as generated ones, not as a prompt.")
@click.option("--threads", default=0, help="Threads that compute; 0 means the usable cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def command(
    model: str,
    reference: str | None,
    text_file: str | None,
    windows: int,
    window_tokens: int,
    generated: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Measures a model's quality on a text.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. Prints the perplexity and, against a
    reference, the perplexity ratio, the KL divergence of its next-token distributions in nats, and how often the two
    models' most probable tokens agree; each with the interval that holds 95 % of block-bootstrap draws.
    """
    for option, value in (("--windows", windows), ("--window-tokens", window_tokens)):
        if value < 1:
            raise RequestError(f"{option} {value} is out of range: at least 1")
    text = None if text_file is None else _read(text_file)
    from strop.bench.evaluate import EvalOptions, evaluate

    options = EvalOptions(model, reference, text, windows, window_tokens, generated, threads)
    evaluation = evaluate(options, say=lambda line: print(line, file=sys.stderr))
    print(json.dumps(evaluation.as_json(), indent=1) if as_json else evaluation.describe())


def _read(name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--text {name!r} is not UTF-8 ({error.reason} at byte {error.start}): convert it first"
        ) from error
    except OSError as error:
        raise RequestError(f"--text {name!r} cannot be read ({error.strerror}): give a UTF-8 file, or '-'") from error
