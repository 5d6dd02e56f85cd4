"""The measurements of Pope et al. 2022 as configurations to predict (data/pope2022.json, CC BY 4.0; data/README.md)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from strop.machine.catalog import devices
from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.published import as_multihead, published_spec, with_heads
from strop.models.spec import ModelSpec
from strop.plan.latency import Coefficients, Pass, Placed, layers_latency
from strop.plan.volumes import FfnLayout

DATA = Path(__file__).parent / "data"
PROMPT_TOKENS = 2048
LAYOUT_NAMES: dict[str, FfnLayout] = {
    "ws_1d": "ws1d",
    "ws_2d": "ws2d",
    "wg_x": "wg_x",
    "wg_xy": "wg_xy",
    "wg_xyz": "wg_xyz",
}
SHARDING_NAMES: dict[str, AttentionSharding] = {"head": "heads", "batch": "batch"}
_STATED = {"label", "table", "text", "other_figure", "only_option"}
"""How the file says that the paper states chips and batch, rather than their ratio."""
_FIRST_GATHERED_BATCH = 64
"""Prompts in batches from here on ran weight-gathered (appendix C, Figure 7)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: seconds of one layer."""

    id: str
    figure: str
    spec: ModelSpec
    step: Pass
    placed: Placed
    layer_s: float

    def predicted_s(self, coefficients: Coefficients) -> float:
        """What the model says of the same layer."""
        return layers_latency(self.spec, self.step, self.placed, coefficients).total / self.spec.num_layers


@cache
def read_json(name: str) -> dict[str, Any]:
    """A file of the folder `data`."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def paper() -> dict[str, Any]:
    """The paper's tables and figures."""
    return read_json("pope2022.json")


def split() -> dict[str, Any]:
    """Which points the coefficients are fitted to; fixed before the first fit."""
    return read_json("pope2022_split.json")


def mesh_of(chips: int) -> MeshShape:
    """The mesh of the released code for so many chips."""
    return MeshShape(*paper()["meshes"]["chips_to_xyz"][str(chips)])


def spec_of(model: str, chips: int, layout: FfnLayout = "ws2d") -> ModelSpec:
    """The network as it ran: PaLM 540B with its 48 heads padded to the chips that share them.

    The released benchmark takes 64 heads up to 64 chips and 128 on 128; on 256, 2D runs 128 and 1D 256.
    """
    spec = published_spec(model.replace("_", "-"))
    if model != "palm_540b":
        return spec
    return with_heads(spec, max(64, min(chips, 256 if layout == "ws1d" else 128)))


def place(chips: int, layout: FfnLayout, sharding: AttentionSharding, weight_dtype: str = "bf16") -> Placed:
    """On TPU v4, in the mesh of the released code."""
    return Placed(devices()["tpu-v4"], mesh_of(chips), layout, sharding, weight_dtype)


@cache
def points() -> tuple[Point, ...]:
    """All measurements whose chips and batch the paper states, in the order of the file, each once."""
    found = [point for part in (_figure1_decode, _figure1_prefill, _figure_b1, _figures_6_7_8) for point in part()]
    repeated = split()["same_measurement"]
    return tuple(point for point in found if point.id not in repeated)


def fitted() -> list[Point]:
    """Those that the coefficients are fitted to."""
    ids = set(split()["fitted"])
    return [point for point in points() if point.id in ids]


def scored() -> list[Point]:
    """All others."""
    ids = set(split()["fitted"])
    return [point for point in points() if point.id not in ids]


def _series(figure: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for name, series in paper()[figure]["series"].items():
        for point in series["points"]:
            yield name, series["model"], series["weight_dtype"], point


def _figure1_decode() -> Iterator[Point]:
    for name, model, dtype, point in _series("figure1_decode_ms_per_token"):
        if point["chips_batch_basis"] in _STATED:
            chips, batch = point["chips"], point["batch"]
            yield Point(
                f"figure1_decode/{name}/{chips} chips, batch {batch}",
                "figure1_decode",
                spec_of(model, chips),
                Pass(batch, 1, PROMPT_TOKENS),
                place(chips, "ws2d", "batch", dtype),
                point["per_layer_us"] * 1e-6,
            )


def _figure1_prefill() -> Iterator[Point]:
    for name, model, dtype, point in _series("figure1_prefill_s"):
        if point["chips_batch_basis"] in _STATED:
            chips, batch = point["chips"], point["batch"]
            gathered = batch >= _FIRST_GATHERED_BATCH
            yield Point(
                f"figure1_prefill/{name}/{chips} chips, batch {batch}",
                "figure1_prefill",
                spec_of(model, chips),
                Pass(batch, PROMPT_TOKENS, PROMPT_TOKENS),
                place(chips, "wg_xyz" if gathered else "ws2d", "batch" if gathered else "heads", dtype),
                point["per_layer_per_token_us"] * 1e-6 * PROMPT_TOKENS,
            )


def _figure_b1() -> Iterator[Point]:
    for name, model, dtype, point in _series("figureB1_prefill_ms"):
        chips, tokens = point["chips"], point["sequence_tokens"]
        yield Point(
            f"figureB1/{name}/{chips} chips, {tokens} tokens",
            "figureB1",
            spec_of(model, chips),
            Pass(1, tokens, tokens),
            place(chips, "ws2d", "heads", dtype),
            point["per_layer_per_token_us"] * 1e-6 * tokens,
        )


def _figures_6_7_8() -> Iterator[Point]:
    six, seven, eight = (paper()[name] for name in ("figure6_decode_ms", "figure7_prefill_mfu", "figure8_ms_per_step"))
    for name, rows in six["series"].items():
        layout = LAYOUT_NAMES[name]
        for row in rows:
            chips = row["chips"]
            yield Point(
                f"figure6/{name}/{chips} chips",
                "figure6",
                spec_of("palm_540b", chips, layout),
                Pass(six["batch"], 1, six["context_tokens"]),
                place(chips, layout, "batch"),
                row["per_layer_us"] * 1e-6,
            )
    for name, rows in seven["series"].items():
        layout = LAYOUT_NAMES[name]
        for row in rows:
            yield Point(
                f"figure7/{name}/batch {row['batch']}",
                "figure7",
                spec_of("palm_540b", seven["chips"]),
                Pass(row["batch"], PROMPT_TOKENS, PROMPT_TOKENS),
                place(seven["chips"], layout, "batch" if layout == "wg_xyz" else "heads"),
                row["per_layer_per_token_us"] * 1e-6 * PROMPT_TOKENS,
            )
    for name, rows in eight["series"].items():
        for row in rows:
            yield Point(
                f"figure8/{name}/context {row['context_tokens']}",
                "figure8",
                figure8_spec(name),
                Pass(eight["batch"], 1, row["context_tokens"]),
                place(eight["chips"], "ws2d", "batch" if name == "multiquery_sharded_over_batch" else "heads"),
                row["per_layer_us"] * 1e-6,
            )


def figure8_spec(series: str) -> ModelSpec:
    """PaLM 540B with 64 heads; as `multihead` with as many key and value heads, of half the size."""
    spec = spec_of("palm_540b", 64)
    return as_multihead(spec, head_dim=128) if series == "multihead" else spec
