"""Linear layers on packed weights (native/kernels/linear.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.program import call_native
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS, Weight


def declines(call: Any) -> str | None:
    """Serves packed weights only; see `declines_gate`."""
    if call.format not in PACKED_FORMATS:
        return f"format {call.format!r} is not packed"
    return declines_gate(call.n_len // 2) if call.epilogue == "swiglu" else None


def declines_gate(ffn_dim: int) -> str | None:
    """A packed gated MLP alternates tiles of 16 gate and up rows."""
    if ffn_dim % TILE_COLUMNS:
        return f"gate and up tiles alternate, so F must be a multiple of {TILE_COLUMNS}, not {ffn_dim}"
    return None


def linear(
    x: jax.Array,
    weight: Weight,
    index: int,
    counts: jax.Array,
    layer: int,
    norm: Any,
    bias: jax.Array | None,
    residual: jax.Array | None,
    swiglu: bool,
    count_index: int,
    row_ids: jax.Array | None,
) -> jax.Array:
    """See strop.ops.linear.linear."""
    packed = PACKED_FORMATS[weight.format]
    n_len = weight.shape[0]
    num_rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    epilogue = 2 if swiglu else 0 if residual is None else 1
    optional = (None if norm is None else norm.weight, bias, residual, row_ids)
    has = [operand is not None for operand in optional]
    (y,) = call_native(
        "linear",
        [x, weight.data, counts, *(operand for operand in optional if operand is not None)],
        [jax.ShapeDtypeStruct((num_rows, n_len // 2 if swiglu else n_len), jnp.float32)],
        index, layer, packed.code, packed.zero, weight.num_tiles, epilogue, has[0], has[1], has[3], count_index,
        0.0 if norm is None else float(norm.eps),
    )  # fmt: skip
    return y
