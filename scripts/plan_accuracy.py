"""Measure this machine, predict steps of models, measure these, and print each error.

`python scripts/plan_accuracy.py MODEL.gguf [MODEL.gguf ...] [--json OUT.json]`. Per model a short calibration, and
decode steps and prompts that are not among its points, in rounds of both: a shared machine is some ten percent faster
or slower from one minute to the next, which is no error of the prediction. A third of all runs are shorter than what
counts.
Wants an idle machine; on a busy one, `--processor-time` runs one thread and counts the time that it had the processor.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from strop.bench.predictions import Cell, Outcome, measure_cell, percentile, predict_cell, prepare
from strop.core.config import GIB, EngineConfig
from strop.engine.costs import CostModel
from strop.engine.engine import Engine
from strop.machine.profile import this_machine
from strop.ops import native
from strop.plan.calibrate import FULL, Calibration, typical
from strop.plan.predict import Predictor

DECODE = [(batch, context) for batch in (1, 4, 16, 64) for context in (128, 1024, 4096)]
DECODE += [(batch, 512) for batch in (2, 8, 32)]
PREFILL = (128, 512, 1024, 2048, 4096)


def formats_of(engine: Engine) -> tuple[str, ...]:
    names = {part.format for weight in engine.params.weights.values() for part in weight.parts}
    return tuple(sorted(names | {"q8"}))


def outcomes(path: Path, options: argparse.Namespace) -> list[Outcome]:
    memory_bytes = int(options.memory_gib * GIB)
    clock = time.thread_time if options.processor_time else time.perf_counter
    library = native.library()
    assert library is not None, "build the native library first"
    config = EngineConfig(
        max_num_seqs=64,
        max_context_len=4224,
        prefix_cache=False,
        memory_bytes=memory_bytes,
        num_threads=1 if options.processor_time else 0,
    )
    probe = Engine.load(str(path), replace(config, num_blocks=2))
    per_token = probe.memory.cache_bytes_per_token
    room = memory_bytes - probe.memory.weight_bytes - probe.memory.activation_bytes - probe.memory.runtime_bytes
    cells = [Cell("decode", *shape) for shape in DECODE] + [Cell("prefill", 1, length) for length in PREFILL]
    cells = [cell for cell in cells if cell.num_tokens * per_token < 0.95 * room]
    num_blocks = 2 + max(cell.batch * (-(-(cell.context_len + 64) // 32) + 1) for cell in cells)
    del probe
    engine = Engine.load(str(path), replace(config, num_blocks=num_blocks))
    prepare(engine)
    machine = this_machine(native.isa() or "", engine.config.num_threads, native.library_path() or Path())
    extent = replace(FULL, seconds=options.calibrate_s, formats=formats_of(engine), kv_dtypes=("bf16",))
    calibration = Calibration(library, machine, extent, clock)
    times: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for i in range(options.rounds):
        calibration.run(options.calibrate_s / options.rounds)
        for cell, found in times.items():
            if sum(found) <= (i + 1) / options.rounds * options.most_s:
                found += measure_cell(engine, cell, options.cell_s / options.rounds, clock)
    predictor = Predictor(calibration.profile(), CostModel(engine.params, engine.spec, engine.layout))
    found = [
        Outcome(path.stem, cell, typical(seconds), predict_cell(predictor, cell, engine))
        for cell, seconds in times.items()
        if seconds
    ]
    for outcome in found:
        show(outcome)
    return found


def show(outcome: Outcome) -> None:
    cell, predicted = outcome.cell, outcome.predicted
    shares = " ".join(f"{name} {100 * s / predicted.seconds:.0f}%" for name, s in predicted.binding.items())
    print(
        f"{outcome.model[:16]:16} {cell.phase:7} {cell.batch:3} x {cell.context_len:<5} "
        f"{1e3 * outcome.measured_s:10.2f} ms {1e3 * predicted.seconds:10.2f} ms {outcome.error:+7.1%} "
        f" {shares}",
        flush=True,
    )


def describe(name: str, errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{name}: {len(sizes)} cells, median {median(sizes):.1%}, 95th percentile {percentile(sizes, 0.95):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--memory-gib", type=float, default=16.0)
    parser.add_argument("--calibrate-s", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cell-s", type=float, default=1.5, help="seconds for each cell, all rounds together")
    parser.add_argument("--most-s", type=float, default=25.0, help="no further runs of a cell that has taken so long")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [one for path in options.models for one in outcomes(path, options)]
    for phase in ("decode", "prefill"):
        some = [one for one in found if one.cell.phase == phase]
        print(describe(phase, [one.error for one in some]))
    print(describe("all", [one.error for one in found]))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], default=str, indent=1))


if __name__ == "__main__":
    main()
