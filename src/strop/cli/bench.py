"""`strop bench MODEL`: a card, the machine's limit, what we reach of it, and how others do."""

import json
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from strop.cli.options import refuse_options
from strop.core.config import KvDtype
from strop.core.errors import RequestError

ROWS = ("decode", "throughput", "prefill", "start", "rss", "fidelity")


@click.command("bench")
@click.argument("model", required=False)
@click.option(
    "--plan", type=click.Path(path_type=Path), help="File of `strop plan --out`: measure what it promises, and no rows."
)
@click.option(
    "--seconds",
    default=20.0,
    type=click.FloatRange(1),
    help="For how long, with --plan; at least until each of its sequences had a turn.",
)
@click.option("--against", default="", help="Engines to measure beside ours: llama.cpp,openvino,vllm.")
@click.option("--peers", type=click.Path(path_type=Path), help="Where they are; ~/.cache/strop/peers if not given.")
@click.option("--rows", default=",".join(ROWS), help="What to measure.")
@click.option("--batches", default="1,8,16,32", help="Batch sizes of the decode and throughput rows.")
@click.option("--repeats", default=5, help="Rounds; every engine runs once in each. Values are medians.")
@click.option("--kv-dtype", type=click.Choice(["bf16", "int8"]), default="bf16", help="How our cache stores numbers.")
@click.option("--threads", default=0, help="Threads that compute, for everybody; 0 means the usable cores.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything measured to this file.")
def command(
    model: str | None,
    plan: Path | None,
    seconds: float,
    against: str,
    peers: Path | None,
    rows: str,
    batches: str,
    repeats: int,
    kv_dtype: KvDtype,
    threads: int,
    json_file: Path | None,
) -> None:
    """Measures a model on this machine.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. Ends with exit code 1 when a row beats
    the probed limit. `strop bench serve URL` measures a server.

    With --plan it runs the requests that the plan is for, in this process, and prints each promise beside what came of
    it. MODEL may then be left out.
    """
    if plan is not None:
        refuse_options("does not go with --plan, which says what is run", but=("model", "plan", "seconds", "json_file"))
        _measure_plan(plan, model, seconds, json_file)
        return
    if model is None:
        raise RequestError("MODEL is missing: give one, or --plan FILE")
    if click.get_current_context().get_parameter_source("seconds") is ParameterSource.COMMANDLINE:
        raise RequestError("--seconds is for --plan: rows take as long as they take")
    from strop.bench.peers import default_directory
    from strop.bench.report import shares_above_one
    from strop.bench.session import BenchOptions, run_bench

    options = BenchOptions(
        model,
        frozenset(_names("--rows", rows, ROWS)),
        tuple(_batches(batches)),
        _at_least_one("--repeats", repeats),
        threads,
        kv_dtype,
        tuple(name.strip() for name in against.split(",") if name.strip()),
        peers or default_directory(),
    )
    report = run_bench(options, lambda text: print(text, flush=True))
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), indent=1))
    if shares_above_one(report):
        sys.exit(1)


def _measure_plan(plan: Path, model: str | None, seconds: float, json_file: Path | None) -> None:
    from strop.bench.planned import as_json, measure_plan
    from strop.cli.output import print_table
    from strop.core.plan_file import read_plan

    settings, facts = read_plan(plan)
    run = facts.chosen
    full_s = 2 * 60 * run.batch / run.requests_per_min
    if full_s > seconds:
        print(f"{run.batch} sequences at once: this takes about {full_s:.0f} s, if the plan holds", file=sys.stderr)
    promises = measure_plan(settings, facts, model, seconds)
    header = ["", "predicted", "measured", "unit", "error"]
    rows = [[p.name, f"{p.predicted:.4g}", f"{p.measured:.4g}", p.unit, f"{p.error:+.1%}"] for p in promises]
    print(f"{facts.model}, planned for {facts.devices} x {facts.hardware}, measured here\n")
    print_table(header, rows, right_aligned=["predicted", "measured", "error"])
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(facts, promises), indent=1))


def _names(option: str, text: str, accepted: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in accepted:
            raise RequestError(f"{option} {name!r} is unknown: choose from {', '.join(accepted)}")
    return names


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise RequestError(f"--batches {text!r} is not a list of batch sizes: give integers of 1 or more, like 1,8")
    return [int(part) for part in parts]


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise RequestError(f"{option} {value} is out of range: at least 1")
    return value
