"""What the devices of a mesh tell each other, inside a shard_map over its axes.

Over several axes, chunks are in the order in which the axes are named, the first the most significant. Axes of one
device are left out, and a call over none others does nothing and is not recorded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from strop.ops.collective import reference
from strop.ops.dispatch import Implementation, Platform, resolve

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

_IMPLEMENTATIONS = (Implementation("reference", ("native", "xla"), reference.run),)


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """What is static about one call, for counting its cost."""

    op = "collective"
    kind: Kind
    shape: tuple[int, ...]
    """Of what each device gives."""
    dtype: str
    axes: tuple[str, ...]
    """Of the mesh: those with more than one device."""
    num_devices: int
    """K, over which it goes: the product of the axes' sizes."""
    point: str
    """Where in the network: the block and what it is for."""
    looped: bool = False
    """In K - 1 steps around a ring, between which a matrix product goes on (strop.ops.collective.looped)."""

    @property
    def num_bytes(self) -> int:
        """Of what each device gives."""
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize


def all_gather(x: jax.Array, axes: Sequence[str], dim: int, *, platform: Platform, point: str) -> jax.Array:
    """Every device's x, one after the other along `dim`, which grows K-fold."""
    return _run("all_gather", x, axes, dim, platform, point)


def reduce_scatter(x: jax.Array, axes: Sequence[str], dim: int, *, platform: Platform, point: str) -> jax.Array:
    """This device's chunk along `dim`, a K-th of it, of the sum of every device's x. Accumulates in x's dtype."""
    return _run("reduce_scatter", x, axes, dim, platform, point)


def all_reduce(x: jax.Array, axes: Sequence[str], *, platform: Platform, point: str) -> jax.Array:
    """The sum of every device's x. Accumulates in x's dtype."""
    return _run("all_reduce", x, axes, 0, platform, point)


def all_to_all(x: jax.Array, axes: Sequence[str], *, platform: Platform, point: str) -> jax.Array:
    """x [K, ...]: row i goes to device i; row i of the result came from it."""
    return _run("all_to_all", x, axes, 0, platform, point)


def own_chunk(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
    """This device's chunk of an x that all have, along `dim`: nothing is sent."""
    size = axes_size(axes)
    if size == 1:
        return x
    length = x.shape[dim] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(tuple(axes)) * length, length, dim)


def axes_size(axes: Sequence[str]) -> int:
    """How many devices the axes of the surrounding shard_map have together."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _run(kind: Kind, x: jax.Array, axes: Sequence[str], dim: int, platform: Platform, point: str) -> jax.Array:
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    if not axes:
        return x
    call = CollectiveCall(kind, x.shape, x.dtype.name, axes, axes_size(axes), point)
    result: jax.Array = resolve(_IMPLEMENTATIONS, call, platform)(x, dim, call)
    return result
