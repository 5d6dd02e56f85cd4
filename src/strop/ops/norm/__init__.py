"""Normalisation: by itself, or as part of another operation."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.norm import cpu, reference
from strop.ops.norm.reference import layer_norm, rms_norm

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.add_norm),
    Implementation("reference", ("xla",), reference.add_norm),
)


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


@dataclass(frozen=True, slots=True)
class AddNormCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "norm"
    num_rows: int
    model_dim: int
    norm: Literal["rms", "layer"] | None
    scale: float


def add_norm(
    x: jax.Array,
    norm: Norm | None,
    counts: jax.Array,
    *,
    platform: Platform,
    scale: float = 1.0,
    residual: jax.Array | None = None,
) -> jax.Array:
    """residual + scale * norm(x): float32 [T, D], computed in float32. Rows past counts[0] are undefined.

    Args:
        x: float32 [T, D], and so the residual.
        norm: None leaves x as it is.
        counts: int32.
    """
    call = AddNormCall(x.shape[0], x.shape[1], None if norm is None else norm.kind, scale)
    return resolve(_IMPLEMENTATIONS, call, platform)(x, norm, counts, residual, call)
