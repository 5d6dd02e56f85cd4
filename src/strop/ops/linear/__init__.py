"""Linear layers with what fuses into them: a norm before; bias, activation, scale, cap and residual after."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.linear import cpu, reference
from strop.ops.norm import Norm
from strop.ops.weights import AnyWeight

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "gelu_sigmoid"]

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.linear, cpu.declines),
    Implementation("reference", ("native", "xla"), reference.linear, reference.declines),
)


@dataclass(frozen=True, slots=True)
class LinearCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "linear"
    num_rows: int
    k_len: int
    n_len: int
    format: str
    weight_bytes: int
    layer: int = 0
    count_index: int = 0
    norm: Literal["rms", "layer"] | None = None
    activation: Activation | None = None
    gated: bool = False
    scale: float = 1.0
    soft_cap: float | None = None


class LinearOperands(NamedTuple):
    """The arrays that a call may have besides input and weight."""

    norm: Norm | None
    bias: jax.Array | None
    residual: jax.Array | None
    row_ids: jax.Array | None


def linear(
    x: jax.Array,
    weight: AnyWeight,
    index: int,
    counts: jax.Array,
    *,
    platform: Platform,
    layer: int = 0,
    norm: Norm | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    residual: jax.Array | None = None,
    count_index: int = 0,
    row_ids: jax.Array | None = None,
) -> jax.Array:
    """residual + cap(scale * act(norm(x) @ weight[index].T + bias)): float32 [T, N], or [T, N / 2] when gated.

    Args:
        x: float32 [T, K].
        weight: the stack; `index` picks the matrix [N, K].
        counts: int32; counts[count_index] rows are computed, the rest are undefined.
        layer: row of `bias` [L, N].
        gated: the first half of N gates: act(gate) * up.
        soft_cap: cap(y) is soft_cap * tanh(y / soft_cap).
        residual: float32 like the result.
        row_ids: int32 [R], which rows of x to take; T is R then.

    Accumulates in float32. Packed quantised weights: the input is rounded to int8 per group of 32 (scale absmax/127),
    products of a group are exact in int32. Packed bf16: the input is rounded to bf16.
    """
    n_len, k_len = weight.shape
    num_rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    call = LinearCall(
        num_rows,
        k_len,
        n_len,
        weight.format,
        weight.bytes_per_matrix,
        layer,
        count_index,
        None if norm is None else norm.kind,
        activation,
        gated,
        scale,
        soft_cap,
    )
    operands = LinearOperands(norm, bias, residual, row_ids)
    return resolve(_IMPLEMENTATIONS, call, platform)(x, weight, index, counts, call, operands)
