"""Linear layers with what fuses into them: RMS norm before, bias, residual or gated activation after."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.linear import cpu, reference
from strop.ops.weights import Weight

Epilogue = Literal["none", "residual", "swiglu"]

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.linear, cpu.declines),
    Implementation("reference", ("native", "xla"), reference.linear, reference.declines),
)


class Norm(NamedTuple):
    """RMS norm to apply to the input: weight stack [L, K], and epsilon."""

    weight: jax.Array
    eps: float


@dataclass(frozen=True, slots=True)
class LinearCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "linear"
    num_rows: int
    k_len: int
    n_len: int
    format: str
    weight_bytes: int
    epilogue: Epilogue


def linear(
    x: jax.Array,
    weight: Weight,
    index: int,
    counts: jax.Array,
    *,
    platform: Platform,
    layer: int = 0,
    norm: Norm | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    count_index: int = 0,
    row_ids: jax.Array | None = None,
) -> jax.Array:
    """epilogue(norm(x) @ weight[index].T + bias): float32 [T, N], or [T, N / 2] with swiglu.

    Args:
        x: float32 [T, K].
        weight: the stack; `index` picks the matrix [N, K].
        counts: int32; counts[count_index] rows are computed, the rest are undefined.
        layer: row of `norm.weight` [L, K] and `bias` [L, N].
        residual: float32 [T, N], added to the result.
        row_ids: int32 [R], which rows of x to take; T is R then.
        swiglu: the first half of N gates: silu(gate) * up.

    Accumulates in float32. Packed quantised weights: the input is rounded to int8 per group of 32 (scale absmax/127),
    products of a group are exact in int32. Packed bf16: the input is rounded to bf16.
    """
    epilogue: Epilogue = "swiglu" if swiglu else "none" if residual is None else "residual"
    n_len, k_len = weight.shape
    num_rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    call = LinearCall(num_rows, k_len, n_len, weight.format, weight.bytes_per_matrix, epilogue)
    run = resolve(_IMPLEMENTATIONS, call, platform)
    return run(x, weight, index, counts, layer, norm, bias, residual, swiglu, count_index, row_ids)
