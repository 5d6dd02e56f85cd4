"""Norms of rows whose columns are spread over devices, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from strop.models.mesh import Axis, MeshShape
from strop.ops.collective import all_reduce
from strop.ops.dispatch import Platform
from strop.ops.norm import Norm


class SpreadNorm:
    """What is known of whole rows x [T, D]: found once for all norms of a kind, when the first asks."""

    def __init__(self, x: jax.Array, axes: Sequence[Axis], mesh: MeshShape, platform: Platform) -> None:
        """x: this device's columns [T, D_axes]."""
        self._x, self._axes, self._platform = x, axes, platform
        self._dim = x.shape[1] * mesh.size(axes)
        self._found: dict[tuple[str, float], tuple[jax.Array | None, jax.Array]] = {}

    def __call__(self, norm: Norm | None, columns: jax.Array, place: jax.Array | int) -> jax.Array:
        """The norm of `columns` [T, len] of x, the `place`-th that are so long."""
        if norm is None:
            return columns
        mean, scale = self._of_rows(norm)

        def own(vectors: jax.Array) -> jax.Array:
            length = columns.shape[1]
            return jax.lax.dynamic_slice_in_dim(vectors[norm.row][None], place * length, length, 1)

        y = (columns if mean is None else columns - mean) * scale * own(norm.weight)
        return y if norm.bias is None else y + own(norm.bias)

    def _of_rows(self, norm: Norm) -> tuple[jax.Array | None, jax.Array]:
        """Mean, if it is subtracted, and factor [T, 1] of each row."""
        found = self._found.get((norm.kind, norm.eps))
        if found is None:
            mean = self._mean(self._x) if norm.kind == "layer" else None
            centred = self._x if mean is None else self._x - mean
            found = mean, jax.lax.rsqrt(self._mean(jnp.square(centred)) + norm.eps)
            self._found[norm.kind, norm.eps] = found
        return found

    def _mean(self, y: jax.Array) -> jax.Array:
        total = jnp.sum(y, axis=1, keepdims=True)
        return all_reduce(total, self._axes, platform=self._platform, point="norm") / self._dim
