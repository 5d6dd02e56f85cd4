"""`strop plan --validate`: how far the planner's model is from the paper that it follows."""

import json
import sys
from typing import TYPE_CHECKING

import click

from strop.cli.output import print_table
from strop.core.errors import RequestError

if TYPE_CHECKING:
    from strop.plan.validate import Target


@click.command("plan")
@click.option("--validate", is_flag=True, help="Replay Pope et al. 2022: each table and figure against the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def command(validate: bool, as_json: bool) -> None:
    """Says how far the planner's model is from measurements.

    With --validate it replays "Efficiently Scaling Transformer Inference": counts, communication volumes, memory and
    MFU against the paper's tables, and the latency model against its measurements of PaLM and MT-NLG on TPU v4, to a
    few of which its coefficients were fitted. Ends with exit code 1 if an error is larger than promised.
    """
    if not validate:
        raise RequestError("nothing to do: give --validate")
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
