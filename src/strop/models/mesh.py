"""A mesh of devices, and what a partition layout shards over which of its axes. No jax.

Names and letters after Pope et al. 2022 (section 3): E_x F_yz says that the model dimension is sharded over the axis x
and the feed-forward dimension over y and z.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple

from strop.core.errors import RequestError, UnsupportedError
from strop.models.params import ParamInfo
from strop.models.spec import LayerSpec, ModelSpec

Axis = Literal["x", "y", "z"]
AXES: tuple[Axis, ...] = ("x", "y", "z")
"""Rows, vocabulary and the residual stream's dimension lie in this order: chunks of x are the largest."""
HEAD_AXES: tuple[Axis, ...] = ("z", "y", "x")
"""Heads and the feed-forward dimension lie in this order: what x scatters or a weight-gathered layout gathers is then a
contiguous range."""

LayoutName = Literal["ws1d", "ws2d", "wg_x", "wg_xy", "wg_xyz", "dp"]
AttentionSharding = Literal["heads", "batch"]


class MeshShape(NamedTuple):
    """Devices along each axis."""

    x: int = 1
    y: int = 1
    z: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Of "8", "2x4" or "2x2x2". Raises RequestError."""
        parts = text.split("x")
        if len(parts) > len(AXES) or not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
            raise RequestError(
                f"mesh {text!r:.40} is not a shape: accepted are one to three numbers of devices, such as 8, 2x4, 2x2x2"
            )
        return cls(*map(int, parts))

    def size(self, axes: Iterable[Axis] = AXES) -> int:
        """Devices of these axes together."""
        return math.prod(getattr(self, axis) for axis in axes)

    def __str__(self) -> str:
        return "x".join(map(str, self))


@dataclass(frozen=True, slots=True)
class Placement:
    """What is sharded over which axes."""

    embed: tuple[Axis, ...]
    """D of stored weights. A product with one of them leaves sums to add up over these axes."""
    ffn: tuple[Axis, ...]
    """F and the heads of stored weights."""
    rows: tuple[Axis, ...]
    """Token rows. Weights that are stored sharded over such an axis are gathered for every step."""

    @property
    def vocabulary(self) -> tuple[Axis, ...]:
        """Rows of embedding and head."""
        return tuple(axis for axis in AXES if axis in (*self.embed, *self.ffn))

    @property
    def stream(self) -> tuple[Axis, ...]:
        """D of the residual stream: all but the rows'."""
        return tuple(axis for axis in AXES if axis not in self.rows)

    @property
    def partial_in(self) -> tuple[Axis, ...]:
        """Over which the sums of a first product are to be added: D of weights, once they are gathered."""
        return tuple(axis for axis in self.embed if axis not in self.rows)

    @property
    def partial_out(self) -> tuple[Axis, ...]:
        """The same of a second product: F and heads of weights."""
        return tuple(axis for axis in self.ffn if axis not in self.rows)

    @property
    def edge(self) -> tuple[Axis, ...]:
        """Over which a block gathers its input and scatters its output: `partial_out`, in the order of AXES."""
        return tuple(axis for axis in AXES if axis in self.partial_out)

    @property
    def heads(self) -> tuple[Axis, ...]:
        """Queries when they have been projected, the hidden layer, and what attention gives before it is projected."""
        return (*self.partial_out, *self.partial_in)


PLACEMENTS: dict[LayoutName, Placement] = {
    "ws1d": Placement((), HEAD_AXES, ()),
    "ws2d": Placement(("x",), ("z", "y"), ()),
    "wg_x": Placement(("x",), ("z", "y"), ("x",)),
    "wg_xy": Placement(("x",), ("z", "y"), ("x", "y")),
    "wg_xyz": Placement(("x",), ("z", "y"), AXES),
    "dp": Placement((), (), AXES),
}
"""1D weight-stationary (tensor parallel); 2D; weight-gathered, which share the stored weights of 2D; data parallel."""


def kv_axes(placement: Placement, mesh: MeshShape, num_kv_heads: int) -> tuple[Axis, ...]:
    """Over which axes the weights of keys and values are stored: as many of the heads' as there are heads for."""
    sizes = accumulate(placement.ffn, lambda size, axis: size * mesh.size((axis,)), initial=1)
    return placement.ffn[: sum(num_kv_heads % size == 0 for size in list(sizes)[1:])]


class MeshPart(NamedTuple):
    """The devices of a mesh that lie in one process."""

    placement: Placement
    mesh: MeshShape
    num_devices: int
    attention: AttentionSharding = "heads"

    @property
    def num_shards(self) -> int:
        """Devices with sequences of their own."""
        return self.mesh.size() if self.attention == "batch" else 1

    def num_copies(self, axes: Iterable[Axis]) -> float:
        """Of what is sharded over these axes: what lies here, the whole being 1."""
        return self.num_devices / self.mesh.size(axes)


def of_one_device(spec: ModelSpec, part: MeshPart) -> ModelSpec:
    """The network as wide as a device computes it."""
    num_shards = part.mesh.size(part.placement.partial_out)

    def narrow(layer: LayerSpec) -> LayerSpec:
        heads, mlp = layer.attention, layer.mlp
        narrow_heads = replace(
            heads, num_heads=-(-heads.num_heads // num_shards), num_kv_heads=-(-heads.num_kv_heads // num_shards)
        )
        return replace(layer, attention=narrow_heads, mlp=replace(mlp, ffn_dim=-(-mlp.ffn_dim // num_shards)))

    return replace(spec, layers=tuple(map(narrow, spec.layers)))


def with_caches_of(spec: ModelSpec, part: MeshPart) -> ModelSpec:
    """The network with the key/value heads that the caches of these devices together have."""

    def stored(layer: LayerSpec) -> LayerSpec:
        of_a_device = layer.attention.num_kv_heads
        if part.attention == "heads":
            of_a_device = max(1, of_a_device // part.mesh.size())
        num_kv_heads = part.num_devices * of_a_device
        return replace(layer, attention=replace(layer.attention, num_kv_heads=num_kv_heads))

    return replace(spec, layers=tuple(map(stored, spec.layers)))


def stored_axes(
    info: ParamInfo, placement: Placement, mesh: MeshShape, num_kv_heads: int
) -> tuple[tuple[Axis, ...], ...]:
    """For each dimension of a parameter, the axes over which it is stored sharded. Vectors are on every device."""
    if len(info.axes) == 1:
        return ((),)
    if info.axes[0] in ("V", "P"):
        return placement.vocabulary, ()
    if info.axes[0] == "U":  # a vector is made of it
        return (), ()
    by_letters = {
        "D": placement.embed,
        "F": placement.ffn,
        "N*H": placement.ffn,
        "K*H": kv_axes(placement, mesh, num_kv_heads),
    }
    return tuple(by_letters[letters] for letters in info.axes)


def check_placement(
    spec: ModelSpec, placement: Placement, mesh: MeshShape, attention: AttentionSharding = "heads"
) -> None:
    """Raises UnsupportedError for a size that the mesh does not divide, or a network that cannot be partitioned."""
    others = tuple(axis for axis in AXES if axis not in placement.rows)
    _divides("model_dim", spec.model_dim, others, mesh)
    _divides("model_dim", spec.model_dim, placement.embed, mesh)
    for layer in dict.fromkeys(spec.layers):
        _check_structure(layer, mesh, attention)
        heads = layer.attention
        _divides("ffn_dim", layer.mlp.ffn_dim, (*placement.ffn, *placement.embed), mesh)
        if attention == "batch":
            _divides("num_heads * head_dim", heads.num_heads * heads.head_dim, placement.ffn, mesh)
            _divides("num_heads", heads.num_heads, placement.heads, mesh)
            continue
        _divides("num_heads", heads.num_heads, HEAD_AXES, mesh)
        if heads.num_kv_heads % mesh.size() and mesh.size() % heads.num_kv_heads:
            raise UnsupportedError(
                f"num_kv_heads={heads.num_kv_heads} does not go with {_named(HEAD_AXES, mesh)}: neither divides the"
                f" other; accepted are {_divisors(heads.num_kv_heads)} devices, or a multiple of {heads.num_kv_heads};"
                " or shard attention over the batch"
            )


def check_rows(num_rows: int, axes: tuple[Axis, ...], mesh: MeshShape) -> None:
    """Raises UnsupportedError for a step whose rows these axes do not divide."""
    _divides("a step's rows", num_rows, axes, mesh, "any multiple of the devices would: pad the step")


def _check_structure(layer: LayerSpec, mesh: MeshShape, attention: AttentionSharding) -> None:
    if mesh.size() == 1:
        return
    if layer.experts is not None:
        raise UnsupportedError(
            f"a mixture of experts (num_experts={layer.experts.num_experts}) is not partitioned: run it on one device"
        )
    if attention == "batch":
        return
    heads = layer.attention
    qk_norm = None if heads.qk_norm is None or heads.qk_norm.over == "head" else heads.qk_norm.over
    for name, value in (("sinks", heads.sinks), ("alibi_scale", heads.alibi_scale), ("qk_norm over", qk_norm)):
        if value:
            raise UnsupportedError(
                f"attention with {name}={value!r} is not sharded over heads: shard it over the batch, or run the model"
                " on one device"
            )


def _divides(name: str, value: int, axes: tuple[Axis, ...], mesh: MeshShape, cure: str = "") -> None:
    size = mesh.size(axes)
    if value % size == 0:
        return
    sizes = accumulate(axes, lambda size, axis: size * mesh.size((axis,)), initial=1)
    first = next(axis for axis, so_far in zip(axes, list(sizes)[1:], strict=True) if value % so_far)
    raise UnsupportedError(
        f"{name}={value} does not divide over {_named(axes, mesh)}: axis {first}={getattr(mesh, first)} is the first"
        f" that does not go; {cure or f'{_divisors(value)} devices in these axes would'}"
    )


def _named(axes: tuple[Axis, ...], mesh: MeshShape) -> str:
    sizes = ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in sorted(axes))
    return f"the {mesh.size(axes)} devices of the mesh's {sizes}"


def _divisors(value: int) -> str:
    found = [i for i in range(1, min(value, 1024) + 1) if value % i == 0]
    return ", ".join(map(str, found[:-1])) + f" or {found[-1]}" if len(found) > 1 else str(found[0])
