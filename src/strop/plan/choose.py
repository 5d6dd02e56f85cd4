"""Which partition layout to run: the one that takes least time in all phases together."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from strop.machine.catalog import Device
from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.spec import ModelSpec
from strop.plan.latency import Coefficients, Pass, Placed, layers_latency
from strop.plan.volumes import FFN_LAYOUTS, FfnLayout

SHARDINGS: tuple[AttentionSharding, ...] = ("heads", "batch")
SAME_WEIGHTS: tuple[tuple[FfnLayout, ...], ...] = (("ws1d",), tuple(name for name in FFN_LAYOUTS if name != "ws1d"))
"""Layouts that store weights alike: a model changes between them from pass to pass (Pope et al. 2022, 3.2.3)."""


class Phase(NamedTuple):
    """So many equal passes of a network."""

    spec: ModelSpec
    device: Device
    mesh: MeshShape
    step: Pass
    num_passes: int = 1
    weight_dtype: str = "bf16"

    def seconds(self, placed: Placed, coefficients: Coefficients) -> float:
        """Of all its passes' layers."""
        return self.num_passes * layers_latency(self.spec, self.step, placed, coefficients).total


def choose_layouts(phases: Sequence[Phase], coefficients: Coefficients) -> list[Placed]:
    """For each phase the placement; all of them store weights alike, and take the least time together.

    Where activations are sharded over the batch anyway (`wg_xyz`), so is attention.
    """
    best: tuple[float, list[Placed]] | None = None
    for layouts in SAME_WEIGHTS:
        chosen = [min(_timed(phase, layouts, coefficients)) for phase in phases]
        total_s = sum(seconds for seconds, _, _ in chosen)
        if best is None or total_s < best[0]:
            best = total_s, [placed for _, _, placed in chosen]
    assert best is not None
    return best[1]


def _timed(phase: Phase, layouts: tuple[FfnLayout, ...], coefficients: Coefficients) -> list[tuple[float, int, Placed]]:
    found = []
    for order, (layout, sharding) in enumerate(product(layouts, SHARDINGS)):
        if layout == "wg_xyz" and sharding == "heads":
            continue
        placed = Placed(phase.device, phase.mesh, layout, sharding, phase.weight_dtype)
        found.append((phase.seconds(placed, coefficients), order, placed))
    return found
