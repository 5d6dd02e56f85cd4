"""Attention by the native kernel (native/kernels/attention.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.norm.cpu import norm_operands
from strop.ops.program import call_native

BLOCK_LEN = 32


def declines(call: Any) -> str | None:
    """Serves what `declines_shape` does not name, and no norm with a weight for each head."""
    if call.qk_norm == "each_head":
        return "a norm with a weight for each head has no kernel"
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
    sinks = () if operands.sinks is None else (operands.sinks,)
    (q_arrays, q_attrs), (k_arrays, k_attrs) = map(norm_operands, operands.qk_norm or (None, None))
    attended, cache = call_native(
        "attention",
        [qkv, cache, rows.fields, rows.block_tables, rows.counts, *(operands.rope or ()), *sinks, *q_arrays, *k_arrays],
        [
            jax.ShapeDtypeStruct((call.num_rows, call.num_heads * call.head_dim), jnp.float32),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        layer, call.num_heads, call.num_kv_heads, call.head_dim, call.rotary_dim, float(call.scale),
        float(call.soft_cap or 0.0), float(call.alibi_scale or 0.0), call.window_len or 0, bool(sinks),
        *q_attrs, *k_attrs,
        aliases={1: 1},
    )  # fmt: skip
    return attended, cache


def new_cache(shape: tuple[int, ...]) -> jax.Array:
    """A bf16 array with arbitrary contents: its pages take memory only once they are written."""
    return jax.jit(lambda: jax.ffi.ffi_call("strop_allocate", jax.ShapeDtypeStruct(shape, jnp.bfloat16))())()
