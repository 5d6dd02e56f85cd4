"""`strop inspect MODEL`: what a file holds and what it would take and reach here, without loading it."""

import json
import sys
from typing import TYPE_CHECKING

import click

from strop.cli.output import print_facts, print_table, size
from strop.cli.verb import flags_of, in_flags
from strop.core.config import GIB, EngineConfig
from strop.core.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from strop.bench.inspection import Inspection, TensorGroup


@click.command("inspect")
@click.argument("model")
@click.option("--context", default=0, help="Longest prompt + answer in tokens to plan for; 0 means the model's limit.")
@click.option("--sequences", default=1, help="Sequences at once to plan memory for.")
@click.option("--memory", default=0.0, help="Memory limit in GiB; 0 means what is available.")
@click.option("--threads", default=0, help="Threads that compute; 0 means the usable cores.")
@click.option("--no-speed", is_flag=True, help="Do not measure the machine: faster, and no speeds.")
@click.option("--measure", is_flag=True, help="Run it on weights of zeros: takes its memory for some seconds.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text, with every tensor.")
def command(
    model: str,
    context: int,
    sequences: int,
    memory: float,
    threads: int,
    no_speed: bool,
    measure: bool,
    tensors: bool,
    as_json: bool,
) -> None:
    """Says what a model is, without loading it.

    MODEL is a GGUF file (of a split one any part), a Hugging Face folder, an artifact folder, or a Hub id, which is
    downloaded. Prints the network, the tokenizer, the tensors by format, the memory it would take, and the speeds
    this machine's memory and processor allow at most; with --measure also the speed to expect. For a model that
    Strop cannot run it prints what it can and the reason, and ends with exit code 1.
    """
    if not 0 <= memory < 1e9:
        raise RequestError(f"--memory {memory} is out of range: give GiB, or 0 for what is available")
    from strop.bench.inspection import inspect

    config = EngineConfig(
        max_num_seqs=sequences, max_context_len=context, memory_bytes=int(memory * GIB), num_threads=threads
    )
    found = inspect(model, config, with_speed=not no_speed, measure=measure)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    elif found.kind != "unknown":
        _show(found, with_tensors=tensors)
    for problem in found.problems:
        message = str(problem)
        if isinstance(problem, CapacityError):  # the others speak of what stands in the file
            message = in_flags(message, flags_of(command))
        print(f"strop: {message}", file=sys.stderr)
    if found.problems:
        sys.exit(1)


def _show(found: "Inspection", *, with_tensors: bool) -> None:
    from strop.bench.inspection import total
    from strop.models.describe import describe_spec

    facts = [(key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in found.facts.items()]
    print_facts([("model", found.model), ("kind", f"{found.kind}, {size(found.num_file_bytes)}"), *facts])
    if found.spec is not None:
        print()
        print_facts(describe_spec(found.spec))
    if found.tokenizer:
        print()
        print_facts([("tokenizer", found.tokenizer), ("chat template", found.chat_template or "none")])
    if with_tensors and found.tensors:
        print()
        tensors = [
            [info.name, " x ".join(map(str, info.shape)), info.format, size(info.num_bytes)] for info in found.tensors
        ]
        print_table(["tensor", "shape", "format", "size"], tensors, right_aligned=["size"])
    if found.formats:
        print()
        header = ["format", "tensors", "values", "size", "bits per value"]
        print_table(header, [*map(_format_row, [*found.formats, total(found.formats)])], right_aligned=header[1:])
    runs = _runs(found)
    if runs:
        print()
        print_facts(runs)


def _format_row(group: "TensorGroup") -> list[str]:
    known = group.num_bytes and group.num_values
    bits = f"{8 * group.num_bytes / group.num_values:.2f}" if known else ""
    return [group.format, f"{group.num_tensors:,}", f"{group.num_values:,}", size(group.num_bytes), bits]


def _runs(found: "Inspection") -> list[tuple[str, str]]:
    """What it would take and reach on this machine."""
    rows = []
    if found.no_kernels:
        rows.append(("runs on", f"XLA alone, several times slower than the native kernels ({found.no_kernels})"))
    elif found.platform:
        rows.append(("runs on", "the native kernels" if found.platform == "native" else "XLA"))
    if found.memory is not None:
        memory, fits = found.memory.describe().splitlines()
        rows += [("memory", memory.removeprefix("memory: ")), ("fits", fits.removeprefix("fits: "))]
    if found.measured_speed is not None:
        speed = found.measured_speed
        speeds = _speeds(f"{speed.decode_tokens_per_s:,.0f} tokens/s", speed.prefill_tokens, speed.prefill_tokens_per_s)
        rows.append(("expected", f"{speeds}; measured now, with weights of zeros"))
    if found.speed_limit is not None:
        limit = found.speed_limit
        decode = ", ".join(f"{at.tokens_per_s:,.0f} tokens/s at {at.context_tokens:,}" for at in limit.decode)
        speeds = _speeds(f"{decode} tokens of context", limit.prefill_tokens, limit.prefill_tokens_per_s)
        rows += [
            ("at most", speeds),
            (
                "because",
                f"a token reads {size(limit.decode[0].step_bytes)}, {limit.num_threads} threads read "
                f"{limit.read_bytes_per_s / GIB:.1f} GiB/s (probed now), and no program is faster; `--measure` tells "
                "how close Strop comes",
            ),
        ]
    return rows


def _speeds(decode: str, prefill_tokens: int, prefill_tokens_per_s: float | None) -> str:
    prefill = ""
    if prefill_tokens_per_s is not None:
        prefill = f"; prefill of {prefill_tokens} tokens {prefill_tokens_per_s:,.0f} tokens/s"
    return f"one sequence decodes {decode}{prefill}"
