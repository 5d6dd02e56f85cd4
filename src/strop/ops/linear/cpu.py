"""Linear layers on packed weights (native/kernels/linear.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
) -> jax.Array:
    """See strop.ops.linear.linear."""
    packed = PACKED_FORMATS[weight.format]
    n_len = weight.shape[0]
    unused = jnp.zeros((1, 1), jnp.float32)
    out = jax.ShapeDtypeStruct((x.shape[0], n_len // 2 if swiglu else n_len), jnp.float32)
    return jax.ffi.ffi_call("strop_linear", out)(
        x,
        unused if norm is None else norm.weight,
        weight.data,
        unused if bias is None else bias,
        unused if residual is None else residual,
        counts,
        index=np.int32(index),
        layer=np.int32(layer),
        format=np.int32(packed.code),
        zero=np.int32(packed.zero),
        num_tiles=np.int32(weight.num_tiles),
        epilogue=np.int32(2 if swiglu else 0 if residual is None else 1),
        has_norm=np.int32(norm is not None),
        has_bias=np.int32(bias is not None),
        eps=np.float32(0.0 if norm is None else norm.eps),
        count_index=np.int32(count_index),
    )
