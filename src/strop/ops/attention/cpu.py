"""Attention by the native kernel (native/kernels/attention.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.core.config import KvDtype
from strop.ops.cost import KV_BYTES
from strop.ops.norm.cpu import norm_operands
from strop.ops.program import call_native

BLOCK_LEN = 32


def declines(call: Any) -> str | None:
    """Serves what `declines_shape` does not name."""
    return declines_shape(call.head_dim, call.block_len)


def declines_shape(head_dim: int, block_len: int) -> str | None:
    """Serves pages of 32 tokens and heads of a multiple of 16, at most 512."""
    if block_len != BLOCK_LEN:
        return f"pages hold {BLOCK_LEN} tokens, not {block_len}"
    if head_dim % 16 or head_dim > 512:
        return f"heads need a multiple of 16 up to 512 dimensions, not {head_dim}"
    return None


def attention(
    qkv: jax.Array, cache: jax.Array | None, layer: int, rows: Any, operands: Any, call: Any
) -> tuple[jax.Array, jax.Array | None]:
    """See strop.ops.attention.attention."""
    assert cache is not None, "the native kernel attends through a cache"
    sinks, sinks_row = ((), -1) if operands.sinks is None else ((operands.sinks[0],), operands.sinks[1])
    (q_arrays, q_attrs), (k_arrays, k_attrs) = map(norm_operands, operands.qk_norm or (None, None))
    attended, cache = call_native(
        "attention",
        [qkv, cache, rows.fields, rows.block_tables, rows.counts, *(operands.rope or ()), *sinks, *q_arrays, *k_arrays],
        [
            jax.ShapeDtypeStruct((call.num_rows, call.num_heads * call.head_dim), jnp.float32),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        call.kv_dtype == "int8", layer, call.num_heads, call.num_kv_heads, call.head_dim, call.rotary_dim,
        float(call.scale), float(call.soft_cap or 0.0), float(call.alibi_scale or 0.0), call.window_len or 0,
        sinks_row, *q_attrs, *k_attrs,
        aliases={1: 1},
    )  # fmt: skip
    return attended, cache


def new_cache(num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, kv_dtype: KvDtype) -> jax.Array:
    """An array with arbitrary contents: its pages take memory only once they are written."""
    item_bytes, scale_bytes = KV_BYTES[kv_dtype]
    dtype = {1: jnp.uint8, 2: jnp.bfloat16}[item_bytes]
    page_len = BLOCK_LEN * (head_dim + scale_bytes // item_bytes)
    shape = jax.ShapeDtypeStruct((num_layers, num_blocks, num_kv_heads, 2, page_len), dtype)
    return jax.jit(lambda: jax.ffi.ffi_call("strop_allocate", shape)())()
