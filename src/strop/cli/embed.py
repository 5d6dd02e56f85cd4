"""`strop embed MODEL TEXT...`: a vector for each text, as JSON lines."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click

from strop.cli.options import engine_config, engine_options
from strop.cli.verb import start_up
from strop.core.config import EngineConfig
from strop.core.errors import RequestError


@click.command("embed")
@click.argument("model")
@click.argument("text", nargs=-1, required=True)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "last", "max"]),
    help="Which hidden states make the vector; the model's own way if not given.",
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Scale vectors to length 1; the model's own way if not given."
)
@click.option("--no-truncate", is_flag=True, help="Refuse a text that is too long, instead of cutting it.")
@engine_options()
def command(
    model: str,
    text: tuple[str, ...],
    pooling: Any,
    normalize: bool | None,
    no_truncate: bool,
    **settings: Any,
) -> None:
    """Makes a vector of each text: with an encoder, such as BERT or MiniLM, or with a decoder's hidden states.

    MODEL is a Hugging Face folder (with the files of sentence-transformers, if it has them), a GGUF file, an artifact
    folder, or a Hub id. TEXT '-' reads standard input, a text per line. Each line of the output is a JSON object:
    index, embedding, num_tokens, and num_cut_tokens where the text was too long.
    """
    config = replace(engine_config(settings), max_num_seqs=EngineConfig().max_num_seqs)
    with start_up():
        from strop.engine.embedder import Embedder
        from strop.engine.loading import load_model

        def say(plan: Any) -> None:
            print(plan.describe().partition("\n")[0], file=sys.stderr)

        embedder = Embedder(*load_model(model, config, on_plan=say, runner="pooling"))
    texts = _lines() if text == ("-",) else iter(text)
    outputs = embedder.embed(texts, pooling=pooling, normalize=normalize, truncate=not no_truncate)
    for index, output in enumerate(outputs):
        line = {
            "index": index,
            "embedding": output.outputs.embedding,
            "num_tokens": len(output.prompt_token_ids),
        }
        if output.num_cut_tokens:
            line["num_cut_tokens"] = output.num_cut_tokens
        print(json.dumps(line), flush=True)


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"line {number} of standard input is not UTF-8 ({error.reason})") from None
