"""Token rows for heads: what moves when one part of a network shards its rows and the next its heads.

Rows of a step lie in the order of AXES (strop.models.mesh), the local ones last: [X, Y, Z, t], where an axis over which
they are sharded counts 1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from strop.models.mesh import AXES, Axis, MeshShape
from strop.ops.collective import all_to_all
from strop.ops.dispatch import Platform


@dataclass(frozen=True, slots=True)
class Exchange:
    """Moves arrays [T, N, ...] within a mesh, at one point of a network."""

    mesh: MeshShape
    platform: Platform
    point: str
    sent: str

    def split_rows(self, y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis]) -> jax.Array:
        """y [T, N, ...] -> [T / K, N * K, ...]: rows sharded over `axes`, too, and heads over them no longer.

        Args:
            axes: over which heads are sharded, the first the most significant.
            rows_over: axes over which y's rows are sharded.
        """
        k = self.mesh.size(axes)
        if k == 1:
            return y
        num_rows, num_heads = y.shape[0] // k, y.shape[1]
        chunks = axes_first(y, axes, rows_over, self.mesh).reshape(k, num_rows, *y.shape[1:])
        received = self._all_to_all(chunks, axes)
        return jnp.moveaxis(received, 0, 1).reshape(num_rows, k * num_heads, *y.shape[2:])

    def join_rows(self, y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis]) -> jax.Array:
        """y [T, N, ...] -> [T * K, N / K, ...]: the reverse.

        Args:
            axes: over which heads will be sharded, and rows no longer.
            rows_over: axes over which rows of the result are sharded.
        """
        k = self.mesh.size(axes)
        if k == 1:
            return y
        num_rows, num_heads = y.shape[0], y.shape[1] // k
        chunks = jnp.moveaxis(y.reshape(num_rows, k, num_heads, *y.shape[2:]), 1, 0)
        received = self._all_to_all(chunks, axes)
        others = [axis for axis in AXES if axis not in axes and axis not in rows_over]
        stored = [*axes, *others]
        parted = received.reshape(*(self.mesh.size((axis,)) for axis in stored), -1, num_heads, *y.shape[2:])
        order = [stored.index(axis) for axis in AXES if axis in stored]
        ordered = parted.transpose(*order, *range(len(order), parted.ndim))
        return ordered.reshape(num_rows * k, num_heads, *y.shape[2:])

    def _all_to_all(self, chunks: jax.Array, axes: Sequence[Axis]) -> jax.Array:
        received = all_to_all(chunks.astype(self.sent), axes, platform=self.platform, point=self.point)
        return received.astype(chunks.dtype)


def own_rows(y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], mesh: MeshShape) -> jax.Array:
    """This device's rows of y [T, ...] -> [T / K, ...], where all devices of `axes` have them."""
    k = mesh.size(axes)
    if k == 1:
        return y
    chunks = axes_first(y, axes, rows_over, mesh).reshape(k, y.shape[0] // k, *y.shape[1:])
    return jax.lax.dynamic_index_in_dim(chunks, jax.lax.axis_index(tuple(axes)), keepdims=False)


def axes_first(y: jax.Array, axes: Sequence[Axis], rows_over: Collection[Axis], mesh: MeshShape) -> jax.Array:
    """y [T, ...] with its rows reordered: those of each device of `axes` together."""
    whole = [axis for axis in AXES if axis not in rows_over]
    sizes = [mesh.size((axis,)) for axis in whole]
    parted = y.reshape(*sizes, -1, *y.shape[1:])
    return jnp.moveaxis(parted, [whole.index(axis) for axis in axes], range(len(axes))).reshape(y.shape)
