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
    from strop.bench.inspection import Inspection, SpeedLimit


@click.command("inspect")
@click.argument("model")
@click.option("--context", default=0, help="Longest prompt + answer in tokens to plan for; 0 means the model's limit.")
@click.option("--sequences", default=1, help="Sequences at once to plan memory for.")
@click.option("--memory", default=0.0, help="Memory limit in GiB; 0 means what is available.")
@click.option("--threads", default=0, help="Threads that compute; 0 means the usable cores.")
@click.option("--no-speed", is_flag=True, help="Do not measure the machine: faster, and no speeds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def command(
    model: str, context: int, sequences: int, memory: float, threads: int, no_speed: bool, as_json: bool
) -> None:
    """Says what a model is, without loading it.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. Prints the network, the tensors by
    format, the tokenizer, the memory it would take, and the speeds this machine's memory and processor allow at most.
    For a model that Strop cannot run it prints what it can and the reason, and ends with exit code 1.
    """
    if not 0 <= memory < 1e9:
        raise RequestError(f"--memory {memory} is out of range: give GiB, or 0 for what is available")
    from strop.bench.inspection import inspect

    config = EngineConfig(
        max_num_seqs=sequences, max_context_len=context, memory_bytes=int(memory * GIB), num_threads=threads
    )
    found = inspect(model, config, with_speed=not no_speed)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _show(found)
    for problem in found.problems:
        message = str(problem)
        if isinstance(problem, CapacityError):  # the others speak of what stands in the file
            message = in_flags(message, flags_of(command))
        print(f"strop: {message}", file=sys.stderr)
    if found.problems:
        sys.exit(1)


def _show(found: "Inspection") -> None:
    from strop.models.describe import describe_spec

    print_facts([("model", found.model), ("kind", f"{found.kind}, {size(found.num_file_bytes)}"), *found.facts.items()])
    if found.spec is not None:
        print()
        print_facts(describe_spec(found.spec))
    if found.tokenizer:
        print()
        template = found.chat_template or "none"
        print_facts([("tokenizer", found.tokenizer), ("chat template", template)])
    if found.tensors:
        print()
        rows = [
            [group.format, f"{group.num_tensors:,}", f"{group.num_values:,}", size(group.num_bytes)]
            for group in found.tensors
        ]
        header = ["format", "tensors", "values", "size"]
        print_table(header, rows, right_aligned=header[1:])
    if found.memory is not None:
        print(f"\n{found.memory.describe()}")
    if found.speed is not None:
        print(f"\n{_speed(found.speed)}")


def _speed(speed: "SpeedLimit") -> str:
    prefill = "the prefill limit needs the native kernels"
    if speed.prefill_tokens_per_s is not None:
        prefill = f"prefill of {speed.prefill_tokens} tokens {speed.prefill_tokens_per_s:,.0f} tokens/s"
    step, bandwidth = size(speed.decode_step_bytes), f"{speed.read_bytes_per_s / GIB:.1f} GiB/s"
    return (
        "limit on this machine at batch 1, which no program can pass: "
        f"decode {speed.decode_tokens_per_s:,.0f} tokens/s, {prefill}\n"
        f"({step} to read per token at {bandwidth}, as measured now; `strop bench` measures the real speed)"
    )
