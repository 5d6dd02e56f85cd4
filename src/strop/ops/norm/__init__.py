"""Normalisation: by itself, or as part of another operation."""

from typing import Literal, NamedTuple

import jax

from strop.ops.norm.reference import layer_norm, rms_norm


class Norm(NamedTuple):
    """A norm with its parameters: stacks [L, D], and which row of them."""

    kind: Literal["rms", "layer"]
    weight: jax.Array
    bias: jax.Array | None
    eps: float
    row: int = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """The norm of float32 x [..., D]."""
        weight = self.weight[self.row]
        if self.kind == "rms":
            return rms_norm(x, weight, self.eps)
        return layer_norm(x, weight, None if self.bias is None else self.bias[self.row], self.eps)
