"""`strop plan`: how to run a model on hardware, and how far the planner's model is from the paper that it follows."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from strop.cli.options import refuse_options
from strop.cli.output import print_table
from strop.core.errors import RequestError

if TYPE_CHECKING:
    from strop.plan.validate import Target


@click.command("plan")
@click.argument("model", required=False)
@click.option(
    "--hardware",
    help="A name of the catalog with xN for N of them, such as h200x8, or a file.toml; else this machine.",
)
@click.option(
    "--objective",
    default="",
    help="Bounds and an aim: ttft=200ms,itl=30ms (also max_itl, e2e), and cost, latency, throughput or balance.",
)
@click.option("--traffic", help="in=512,out=128,rate=4 (rate: requests per second), or a CSV file of arrivals.")
@click.option("--mesh", help="Devices of one copy by axis, such as 2x4; else any shape.")
@click.option("--weights", type=click.Choice(["bf16", "int8"]), help="Precision of the weights; else either.")
@click.option(
    "--price-per-hour", type=click.FloatRange(0), help="Of one device; else the catalog's, or device-seconds."
)
@click.option("--explain", is_flag=True, help="Show the chosen configuration op by op.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots of latency and cost.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the choice, for --plan of serve and run.")
@click.option("--validate", is_flag=True, help="Replay Pope et al. 2022: each table and figure against the model.")
@click.option(
    "--calibrate", is_flag=True, help="Measure this machine's kernels, for less than a minute, and keep that."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def command(model: str | None, validate: bool, calibrate: bool, as_json: bool, **asked: Any) -> None:
    """Chooses how to run a model on hardware: precision, devices, layout, batch and chunks.

    MODEL is a published name (palm-8b, palm-62b, palm-540b, mt-nlg-530b), a GGUF file, a Hugging Face folder, an
    artifact folder, or a Hub id, whose files are fetched. Prints the Pareto frontier of latency against cost, and the
    choice with what to expect of it: latencies, throughput, cost, memory, and what binds. Nothing is loaded or run. The
    CSV file has the columns time_s, prompt_tokens and output_tokens, as for bench serve. An objective that nothing
    reaches ends with exit code 1 and the nearest that does.

    With --validate it replays "Efficiently Scaling Transformer Inference": counts, communication volumes, memory and
    MFU against the paper's tables, and the latency model against its measurements of PaLM and MT-NLG on TPU v4, to a
    few of which its coefficients were fitted. Ends with exit code 1 if an error is larger than promised.

    With --calibrate it measures what this machine's kernels take: products by weight format, size and rows, attention
    by heads and rows, and what a step takes beside them. Wants an idle machine.
    """
    if [model is not None, validate, calibrate].count(True) != 1:
        raise RequestError("give either a model, or --validate, or --calibrate")
    if model is not None:
        from strop.cli.plan_search import show_plan

        show_plan(model, as_json=as_json, **asked)
        return
    refuse_options("is for plans of a MODEL", but=("validate", "calibrate", "as_json"))
    if calibrate:
        _calibrate(as_json)
        return
    from strop.plan.validate import validate as replay

    targets = replay()
    if as_json:
        print(json.dumps({"targets": [target.as_json() for target in targets]}, indent=1))
    else:
        header = ["target", "points", "median error", "worst error", "promised", "ideal machine", "what"]
        print_table(header, [_row(target) for target in targets], right_aligned=header[1:6])
    missed = [target.name for target in targets if not target.holds]
    if missed:
        print(f"strop: larger errors than promised: {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)


def _calibrate(as_json: bool) -> None:
    import msgspec

    from strop.formats.pack_cache import cache_directory
    from strop.machine.profile import profile_path
    from strop.plan.calibrate import machine_profile

    profile = machine_profile(fresh=True)
    if as_json:
        print(msgspec.json.encode(profile).decode())
        return
    machine = profile.machine
    print(f"{machine.cpu}, {machine.isa}, {machine.num_threads} threads\n")
    header = ["products with weights in", "1 row: G weights/s", "12 rows", "64 rows"]
    rows = []
    for name, sizes in profile.linear.items():
        large = sizes[-1]
        rates = [large.num_weights * count / large.cold.growing(count) / 1e9 for count in (1, 12, 64)]
        rows.append([name, *(f"{rate:.1f}" for rate in rates)])
    print_table(header, rows, right_aligned=header[1:])
    curve = profile.read_bytes_per_s
    reads = ", ".join(f"{x / 2**20:.0f} MiB {y / 2**30:.0f}" for x, y in zip(curve.x, curve.y, strict=True))
    print(f"\nreading, by working set: {reads} GiB/s")
    print(
        f"a step beside the kernels: {1e6 * profile.step_s.at(1):.0f} us for 1 sequence,"
        f" {1e6 * profile.step_s.at(64):.0f} for 64"
    )
    print(f"stored in {profile_path(cache_directory(), machine)}")


def _row(target: "Target") -> list[str]:
    def shown(error: float | None) -> str:
        if error is None:
            return ""
        match target.unit:
            case "relative":
                return f"{100 * error:.3g} %"
            case "points":
                return f"{error:.2f} points"
            case "wrong":
                return f"{error:.0%} wrong" if error else "none wrong"

    promised = " / ".join(filter(None, map(shown, (target.most_median_error, target.most_error))))
    errors = [shown(target.median_error), shown(target.worst_error)]
    return [
        target.name,
        str(target.num_points),
        *errors,
        promised,
        shown(target.uncalibrated_median_error),
        target.what,
    ]
