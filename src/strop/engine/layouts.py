"""Which layout a model runs in: what the config asks for, or the one that sends least."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any, get_args

import jax

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.engine.costs import CostModel
from strop.models.abstract import abstract_parameters
from strop.models.layout import Single
from strop.models.mesh import PLACEMENTS, AttentionSharding, LayoutName, MeshShape, check_placement
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.sharding import make_mesh, rearranged
from strop.models.spec import ModelSpec
from strop.ops.dispatch import Platform

_SHARE_WEIGHTS: tuple[LayoutName, ...] = ("ws2d", "wg_x", "wg_xy", "wg_xyz")
"""Of these, each step may take another."""


def choose_layout(spec: ModelSpec, config: EngineConfig, platform: Platform) -> Single | Partition:
    """`config` as a layout. For "auto", the layout for decoding.

    Raises:
        UnsupportedError: the mesh is no shape, has more devices than there are, or does not divide the network.
        RequestError: there is no such layout, or sharding of attention.
    """
    if config.layout != "auto" and config.layout not in PLACEMENTS:
        raise RequestError(
            f"layout={config.layout!r:.40} is unknown: choose from auto, {', '.join(get_args(LayoutName))}"
        )
    if config.attention not in get_args(AttentionSharding):
        raise RequestError(f"attention={config.attention!r:.40} is unknown: choose from heads, batch")
    if not config.mesh:
        if config.layout != "auto":
            raise RequestError(f"layout={config.layout!r} needs a mesh of devices: give one too, such as mesh='2x4'")
        if config.attention != "heads":
            raise RequestError(f"attention={config.attention!r} needs a mesh of devices: give one too, or leave it out")
        return Single(platform, config.block_len, config.kv_dtype)
    mesh = MeshShape.parse(config.mesh)
    make_mesh(mesh)  # raises if there are too few devices
    names = ("ws1d", "ws2d") if config.layout == "auto" else (config.layout,)
    layouts = [
        Partition(name, mesh, config.attention, platform, config.block_len, config.kv_dtype)  # type: ignore[arg-type]
        for name in names
    ]
    for layout in layouts:
        check_placement(spec, layout.placement, mesh, config.attention)
    if len(layouts) == 1:
        return layouts[0]
    whole = abstract_parameters(spec, lambda path: "f32", "xla", num_positions=1)

    def bytes_sent(layout: Partition) -> int:
        layout = replace(layout, platform="xla")
        params = jax.eval_shape(partial(rearranged, spec=spec, layout=layout), whole)
        num_rows = -(-config.max_num_seqs // mesh.size()) * mesh.size()
        return CostModel(params, spec, layout).decode_step(num_rows, 1).bytes_sent

    return min(layouts, key=bytes_sent)


class StepLayouts:
    """The layout of each step: that of the stored weights, or, if it may, whichever sends least."""

    def __init__(self, params: Parameters, spec: ModelSpec, layout: Single | Partition, *, may_change: bool) -> None:
        self._params, self._spec, self.stored = params, spec, layout
        is_dense = isinstance(layout, Partition) and layout.platform == "xla" and layout.name in _SHARE_WEIGHTS
        self._may_change = may_change and is_dense
        self._chosen: dict[int, Single | Partition] = {}

    @cached_property
    def _shapes(self) -> Any:
        return jax.eval_shape(lambda: self._params)

    def of(self, num_rows: int) -> Single | Partition:
        """For steps of so many rows."""
        if not self._may_change:
            return self.stored
        if num_rows not in self._chosen:
            self._chosen[num_rows] = min(self._candidates(num_rows), key=partial(self._bytes_sent, num_rows))
        return self._chosen[num_rows]

    def _candidates(self, num_rows: int) -> list[Partition]:
        assert isinstance(self.stored, Partition)
        layouts = [replace(self.stored, name=name) for name in _SHARE_WEIGHTS]
        return [layout for layout in layouts if num_rows % layout.mesh.size(layout.placement.rows) == 0]

    def _bytes_sent(self, num_rows: int, layout: Partition) -> int:
        return CostModel(self._shapes, self._spec, layout).step(num_rows, 1, [1]).bytes_sent
