"""Replays Pope et al. 2022: each table and figure against the closed forms and the latency model."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Any, Literal

from strop.machine.catalog import find_machines
from strop.models.mesh import MeshShape
from strop.models.published import as_multihead, num_parameters, published_spec, with_heads
from strop.plan.choose import Phase, choose_layouts
from strop.plan.latency import Coefficients, Pass, Placed, head_latency, layers_latency
from strop.plan.memory import longest_context
from strop.plan.points import (
    LAYOUT_NAMES,
    PROMPT_TOKENS,
    SHARDING_NAMES,
    Point,
    fitted,
    mesh_of,
    paper,
    place,
    points,
    read_json,
    scored,
    spec_of,
    split,
)
from strop.plan.volumes import ffn_volume, least_volume_layout, model_flops_utilization, switch_tokens

Unit = Literal["relative", "points", "wrong"]


@dataclass(frozen=True, slots=True)
class Target:
    """One table or figure, and how far the planner is from it."""

    name: str
    what: str
    unit: Unit
    """Of errors: a fraction of the paper's value, percentage points, or 1 for each wrong choice."""
    num_points: int
    median_error: float
    worst_error: float
    uncalibrated_median_error: float | None
    """Of the latency model on an ideal machine: no latencies, peaks reached."""
    most_median_error: float | None = None
    most_error: float | None = None
    """What is promised; None where nothing is."""

    @property
    def holds(self) -> bool:
        """Whether errors are within what is promised."""
        within = self.most_error is None or self.worst_error <= self.most_error
        return within and (self.most_median_error is None or self.median_error <= self.most_median_error)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"holds": self.holds}


@cache
def pope_coefficients() -> Coefficients:
    """Fitted to TPU v4 by scripts/fit_planner.py."""
    return Coefficients(**read_json("pope2022_fit.json")["coefficients"])


def validate() -> list[Target]:
    """All targets, in the paper's order."""
    return [
        *_counting(),
        *(_mfu(name) for name in ("table2_540b", "table3_62b", "D2", "D3", "D4")),
        *_choices(),
        *_latencies(),
    ]


def _target(
    name: str,
    what: str,
    unit: Unit,
    errors: Iterable[float],
    *,
    uncalibrated: Iterable[float] | None = None,
    most_median: float | None = None,
    most: float | None = None,
) -> Target:
    found = [abs(error) for error in errors]
    ideal = None if uncalibrated is None else median(abs(error) for error in uncalibrated)
    return Target(name, what, unit, len(found), median(found), max(found), ideal, most_median, most)


# --- what is counted --------------------------------------------------------------------------------------------------


def _counting() -> Iterator[Target]:
    data = paper()
    models = data["models"]
    counted = {
        name: num_parameters(published_spec(name.replace("_", "-")))
        for name in models
        if "n_params_computed" in models[name]
    }
    errors = [count / models[name]["n_params_computed"] - 1 for name, count in counted.items()]
    padding = num_parameters(with_heads(published_spec("palm-540b"), 64)) - counted["palm_540b"]
    errors.append(padding / models["palm_540b"]["head_padding"]["n_params_added"] - 1)
    yield _target("table_d1", "parameters, and those that padded heads add", "relative", errors, most=0.0)

    figure = data["figure3_comm_gb"]
    mesh, dims = MeshShape(*figure["mesh_xyz"]), (figure["d_model"], figure["d_ff"])
    errors = [
        ffn_volume(layout, row["tokens"], *dims, mesh).total * figure["bytes_per_element"] / 1e9 / row[f"{name}_gb"] - 1
        for row in figure["rows"]
        for name, layout in LAYOUT_NAMES.items()
        if f"{name}_gb" in row
    ]
    yield _target("figure3", "communication volumes", "relative", errors, most=5e-5)
    least = [
        float(least_volume_layout(row["tokens"], *dims, mesh) != LAYOUT_NAMES[row["best_layout"]])
        for row in figure["rows"]
    ]
    yield _target("figure3_layout", "layout of least volume", "wrong", least, most=0.0)
    yield _target("switch_points", "tokens where layouts change", "relative", _switch_errors(), most=5e-5)
    yield _target("table1", "longest context", "relative", _table1_errors(), most=0.015)


def _switch_errors() -> Iterator[float]:
    for case in paper()["switch_points_tokens"].values():
        if not isinstance(case, dict) or "mesh_xyz" not in case:
            continue
        for name, tokens in case.items():
            first, _, second = name.partition("_to_")
            if second:
                mesh = MeshShape(*case["mesh_xyz"])
                found = switch_tokens(LAYOUT_NAMES[first], LAYOUT_NAMES[second], case["d_model"], case["d_ff"], mesh)
                yield found / tokens - 1


def _table1_errors() -> Iterator[float]:
    table, chips = paper()["table1_max_context"], paper()["table1_max_context"]["chips"]
    cache_bytes = table["kv_memory_fraction"] * find_machines("tpu-v4").device.memory_bytes
    multiquery = with_heads(published_spec("palm-540b"), chips)
    for row in table["rows"]:
        spec = as_multihead(multiquery, row["d_head"]) if row["variant"] == "multihead" else multiquery
        sharding = SHARDING_NAMES["batch" if row["variant"].endswith("over_batch") else "head"]
        for batch in (128, 512):
            found = longest_context(spec, sharding, mesh_of(chips), batch, cache_bytes)
            yield found / row[f"batch_{batch}_tokens"] - 1


def _mfu(table: str) -> Target:
    errors = [found - printed for found, printed in (_d_mfu(table) if table.startswith("D") else _table_mfu(table))]
    return _target(f"mfu_{table.lower()}", "MFU from the printed times", "points", errors, most=1.0)


def _table_mfu(table: str) -> Iterator[tuple[float, float]]:
    model = paper()[table]["model"]
    peak = find_machines("tpu-v4").device.peak("bf16")
    for row in paper()[table]["rows"]:
        tokens = row["batch"] * row["tokens_processed_per_sequence"]
        nominal = paper()["models"][model]["n_params_nominal"]
        yield (
            100 * model_flops_utilization(nominal, tokens, row["chips"], peak, row["latency_s"]),
            row["mfu_percent"],
        )


def _time_columns(table: str) -> dict[str, str]:
    """Column whose time to use for a column, where the paper seems to have exchanged them."""
    found = read_json("pope2022_quirks.json")["time_from"]
    return {quirk["column"]: quirk["time_column"] for quirk in found if quirk["table"] == table}


def _d_mfu(table: str) -> Iterator[tuple[float, float]]:
    tables, instead = paper()["tables_d2_d3_d4"], _time_columns(table)
    lengths = {"prefill": tables[table]["input_tokens"], "generate": tables[table]["output_tokens"]}
    peaks = {name: find_machines(name).device.peak("bf16") for name in ("tpu-v4", "a100-80gb")}
    for row in tables[table]["rows"]:
        for column in tables["columns"]:
            printed, milliseconds = row[f"{column}_mfu_percent"], row[f"{instead.get(column, column)}_ms"]
            if printed is None or milliseconds is None:
                continue
            tokens = row["batch"] * lengths.get(column.rpartition("_")[2], sum(lengths.values()))
            peak = peaks[tables["hardware"][column].replace("_", "-")]
            nominal = paper()["models"][tables["model"][column]]["n_params_nominal"]
            mfu = model_flops_utilization(nominal, tokens, tables["chips"][column], peak, milliseconds * 1e-3)
            yield 100 * mfu, printed


# --- what is chosen ---------------------------------------------------------------------------------------------------


def _choices() -> Iterator[Target]:
    for name, wrong in (("layouts", _wrong_layouts), ("ordering", _wrong_orders)):
        for figure, errors, ideal in wrong():
            what = "layouts chosen" if name == "layouts" else "which of the curves is lower"
            yield _target(f"{name}_{figure}", what, "wrong", errors, uncalibrated=ideal, most=0.0)


def table_phases(table: str) -> Iterator[tuple[list[dict[str, Any]], list[Phase]]]:
    """The rows of Table 2 or 3 by objective, and their phases: a prompt, and then 64 tokens."""
    for objective in ("low_latency", "high_throughput"):
        rows = [row for row in paper()[table]["rows"] if row["objective"] == objective]
        phases = []
        for row in rows:
            output = row["output_tokens"] or 0
            step = Pass(row["batch"], 1 if output else PROMPT_TOKENS, row["input_tokens"] + output // 2)
            spec, machines = spec_of(paper()[table]["model"], row["chips"]), find_machines("tpu-v4")
            mesh = mesh_of(row["chips"])
            phases.append(Phase(spec, machines.device, mesh, step, output or 1, row["weight_dtype"]))
        yield rows, phases


def _wrong_layouts() -> Iterator[tuple[str, list[float], list[float]]]:
    for table in ("table2_540b", "table3_62b"):
        wrong: dict[str, list[float]] = {"fitted": [], "ideal": []}
        for rows, phases in table_phases(table):
            for name, coefficients in (("fitted", pope_coefficients()), ("ideal", Coefficients())):
                for row, placed in zip(rows, choose_layouts(phases, coefficients), strict=True):
                    own = LAYOUT_NAMES[row["ffn_layout"]], SHARDING_NAMES[row["attention_layout"]]
                    wrong[name].append(float((placed.layout, placed.sharding) != own))
        yield table, wrong["fitted"], wrong["ideal"]


def _wrong_orders() -> Iterator[tuple[str, list[float], list[float]]]:
    """For each pair of curves at each place on the axis: 1 if the model puts them the other way round."""
    same = split()["same_measurement"]
    by_id = {point.id: point for point in points()}
    by_id |= {id: by_id[other] for id, other in same.items()}
    for figure in ("figure6", "figure7", "figure8"):
        at: dict[str, list[Point]] = {}
        for id, point in by_id.items():
            if id.startswith(f"{figure}/"):
                at.setdefault(id.rpartition("/")[2], []).append(point)
        pairs = [(one, two) for there in at.values() for i, one in enumerate(there) for two in there[:i]]
        yield (
            figure,
            [_other_way(one, two, pope_coefficients()) for one, two in pairs],
            [_other_way(one, two, Coefficients()) for one, two in pairs],
        )


def _other_way(one: Point, two: Point, coefficients: Coefficients) -> float:
    predicted = one.predicted_s(coefficients) < two.predicted_s(coefficients)
    return float(predicted != (one.layer_s < two.layer_s))


# --- how long it takes ------------------------------------------------------------------------------------------------


def _latencies() -> Iterator[Target]:
    def of(name: str, what: str, chosen: list[Point], **most: float) -> Target:
        return _target(
            name, what, "relative", _misses(chosen, pope_coefficients()), uncalibrated=_misses(chosen), **most
        )

    yield of("latency_fitted", "seconds of a layer, the points fitted to", fitted())
    yield of("latency_scored", "seconds of a layer, all other points", scored(), most_median=0.08, most=0.25)
    for figure in dict.fromkeys(point.figure for point in scored()):
        chosen = [point for point in scored() if point.figure == figure]
        yield of(f"latency_{figure}", "of these, the figure's", chosen, most=0.25)
    for table in ("table2_540b", "table3_62b", "D2", "D3", "D4"):
        misses, what = (_d_misses, "PaLM and MT-NLG") if table.startswith("D") else (_table_misses, "a phase")
        errors, ideal = (misses(table, coefficients) for coefficients in (pope_coefficients(), Coefficients()))
        what = f"seconds of {what} with embedding and head; none fitted to"
        yield _target(f"latency_{table.lower()}", what, "relative", errors, uncalibrated=ideal)


def _misses(chosen: list[Point], coefficients: Coefficients | None = None) -> list[float]:
    return [point.predicted_s(coefficients or Coefficients()) / point.layer_s - 1 for point in chosen]


def _table_misses(table: str, coefficients: Coefficients) -> Iterator[float]:
    for rows, phases in table_phases(table):
        for row, phase in zip(rows, phases, strict=True):
            layout, sharding = LAYOUT_NAMES[row["ffn_layout"]], SHARDING_NAMES[row["attention_layout"]]
            placed = Placed(phase.device, phase.mesh, layout, sharding, phase.weight_dtype)
            head_s = head_latency(phase.spec, phase.step, placed, coefficients, rows=phase.step.batch).total
            seconds = phase.seconds(placed, coefficients) + phase.num_passes * head_s
            yield seconds / row["latency_s"] - 1


def _d_misses(table: str, coefficients: Coefficients) -> Iterator[float]:
    tables, instead = paper()["tables_d2_d3_d4"], _time_columns(table)
    inputs, outputs = tables[table]["input_tokens"], tables[table]["output_tokens"]
    for row in tables[table]["rows"]:
        if row["palm_prefill_ms"] is None:
            continue
        prompt, token = Pass(row["batch"], inputs, inputs), Pass(row["batch"], 1, inputs + outputs // 2)
        seconds = {}
        for model in ("palm_540b", "mt_nlg_530b"):
            placed = place(tables["chips"]["palm_prefill"], "ws2d", "heads")
            spec = spec_of(model, placed.mesh.size())
            prefill_s, token_s = (
                layers_latency(spec, step, placed, coefficients).total
                + head_latency(spec, step, placed, coefficients, rows=step.tokens).total
                for step in (prompt, token)
            )
            seconds[model] = prefill_s, outputs * token_s
        prefill_s, generate_s = seconds["palm_540b"]
        for column, predicted in (
            ("palm_prefill", prefill_s),
            ("palm_generate", generate_s),
            ("mt_nlg_total", sum(seconds["mt_nlg_530b"])),
        ):
            yield predicted / (row[f"{instead.get(column, column)}_ms"] * 1e-3) - 1
