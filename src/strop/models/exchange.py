"""What devices send each other, in the type in which it travels, at the points of a network.

Rows of a step lie in the order of AXES (strop.models.mesh), the local ones last: [X, Y, Z, t], where an axis over which
they are sharded counts 1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import jax
import jax.numpy as jnp

from strop.models.mesh import AXES, Axis, MeshShape
from strop.ops.collective import all_gather, all_reduce, all_to_all, reduce_scatter
from strop.ops.dispatch import Platform

Sent = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Exchanges of float32 arrays within a mesh. K is the number of devices of the axes named; where that is 1, nothing
    happens, rounding included."""

    mesh: MeshShape
    platform: Platform
    sent: Sent
    """As what numbers travel."""

    def gather(self, x: jax.Array, axes: Sequence[Axis], dim: int, point: str) -> jax.Array:
        """Every device's x, along `dim`."""
        if self.mesh.size(axes) == 1:
            return x
        return _float32(all_gather(x.astype(self.sent), axes, dim, platform=self.platform, point=point))

    def reduce_scatter(self, x: jax.Array, axes: Sequence[Axis], dim: int, point: str) -> jax.Array:
        """This device's chunk, along `dim`, of the sum of all x."""
        if self.mesh.size(axes) == 1:
            return x
        return _float32(reduce_scatter(x.astype(self.sent), axes, dim, platform=self.platform, point=point))

    def sum(self, x: jax.Array, axes: Sequence[Axis], point: str) -> jax.Array:
        """The sum of all x."""
        if self.mesh.size(axes) == 1:
            return x
        return _float32(all_reduce(x.astype(self.sent), axes, platform=self.platform, point=point))

    def scatter_together(self, parts: list[jax.Array], axes: Sequence[Axis], point: str) -> list[jax.Array]:
        """Each part [T, len] -> [T, len / K]: sums, whose columns are scattered, in one exchange."""
        k = self.mesh.size(axes)
        if k == 1:
            return parts
        chunked = jnp.concatenate([part.reshape(part.shape[0], k, -1) for part in parts], axis=2)
        own = self.reduce_scatter(chunked, axes, 1, point)[:, 0]
        return _split(own, [part.shape[1] // k for part in parts])

    def gather_together(self, parts: list[jax.Array], axes: Sequence[Axis], point: str) -> list[jax.Array]:
        """The reverse, without sums: each part [T, len] -> [T, len K]."""
        if self.mesh.size(axes) == 1:
            return parts
        gathered = self.gather(jnp.concatenate(parts, axis=1)[:, None], axes, 1, point)  # [T, K, len of all]
        whole = _split(gathered, [part.shape[1] for part in parts])
        return [part.reshape(part.shape[0], -1) for part in whole]

    def split_rows(self, y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], point: str) -> jax.Array:
        """y [T, N, ...] -> [T / K, N K, ...]: rows sharded over `axes`, too, and heads over them no longer.

        Args:
            axes: over which heads are sharded, the first the most significant.
            rows_over: axes over which y's rows are sharded.
        """
        k = self.mesh.size(axes)
        if k == 1:
            return y
        num_rows, num_heads = y.shape[0] // k, y.shape[1]
        chunks = axes_first(y, axes, rows_over, self.mesh).reshape(k, num_rows, *y.shape[1:])
        received = self._all_to_all(chunks, axes, point)
        return jnp.moveaxis(received, 0, 1).reshape(num_rows, k * num_heads, *y.shape[2:])

    def join_rows(self, y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], point: str) -> jax.Array:
        """y [T, N, ...] -> [T K, N / K, ...]: the reverse.

        Args:
            axes: over which heads will be sharded, and rows no longer.
            rows_over: axes over which rows of the result are sharded.
        """
        k = self.mesh.size(axes)
        if k == 1:
            return y
        num_rows, num_heads = y.shape[0], y.shape[1] // k
        chunks = jnp.moveaxis(y.reshape(num_rows, k, num_heads, *y.shape[2:]), 1, 0)
        received = self._all_to_all(chunks, axes, point)
        whole = _up_to_last([axis for axis in AXES if axis not in rows_over], axes)
        stored = [*axes, *(axis for axis in whole if axis not in axes)]
        parted = received.reshape(*(self.mesh.size((axis,)) for axis in stored), -1, num_heads, *y.shape[2:])
        order = [stored.index(axis) for axis in whole]
        ordered = parted.transpose(*order, *range(len(order), parted.ndim))
        return ordered.reshape(num_rows * k, num_heads, *y.shape[2:])

    def _all_to_all(self, chunks: jax.Array, axes: Sequence[Axis], point: str) -> jax.Array:
        return _float32(all_to_all(chunks.astype(self.sent), axes, platform=self.platform, point=point))


def own_rows(y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], mesh: MeshShape) -> jax.Array:
    """This device's rows of y [T, ...] -> [T / K, ...], where all devices of `axes` have them."""
    k = mesh.size(axes)
    if k == 1:
        return y
    chunks = axes_first(y, axes, rows_over, mesh).reshape(k, y.shape[0] // k, *y.shape[1:])
    return jax.lax.dynamic_index_in_dim(chunks, jax.lax.axis_index(tuple(axes)), keepdims=False)


def axes_first(y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], mesh: MeshShape) -> jax.Array:
    """y [T, ...] with its rows reordered: those of each device of `axes` together."""
    whole = _up_to_last([axis for axis in AXES if axis not in rows_over], axes)
    sizes = [mesh.size((axis,)) for axis in whole]
    parted = y.reshape(*sizes, -1, *y.shape[1:])
    return jnp.moveaxis(parted, [whole.index(axis) for axis in axes], range(len(axes))).reshape(y.shape)


def _up_to_last(whole: list[Axis], axes: Sequence[Axis]) -> list[Axis]:
    """Of the axes of whole rows those that matter where chunks of `axes` are moved: what follows stays together."""
    return whole[: 1 + max((whole.index(axis) for axis in axes), default=-1)]


def _split(y: jax.Array, lengths: list[int]) -> list[jax.Array]:
    """Pieces of the last axis."""
    return jnp.split(y, list(accumulate(lengths))[:-1], axis=-1)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
