"""Attention over the paged cache in plain jnp: the definition of correct."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.rope.reference import rotate

ROWS_AT_ONCE = 32  # bounds the memory of gathered keys and values


def attention(
    qkv: jax.Array, cache: jax.Array | None, layer: int, rows: Any, operands: Any, call: Any
) -> tuple[jax.Array, jax.Array | None]:
    """See strop.ops.attention.attention. Cache: [L, 2, P, block_len, K, H], any float dtype."""
    _, position, slot, lo, hi, seq = rows.fields
    if call.window_len is not None:
        lo = jnp.maximum(lo, slot + 1 - call.window_len)
    sinks = None if operands.sinks is None else operands.sinks[layer]
    num_rows, num_heads, num_kv_heads, head_dim = call.num_rows, call.num_heads, call.num_kv_heads, call.head_dim
    heads = qkv.reshape(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
    if operands.qk_norm is not None:
        q, k = (_normalise(norm, part, call) for norm, part in zip(operands.qk_norm, (q, k), strict=True))
    if operands.rope is not None:
        cos, sin = (table[position] for table in operands.rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is None:
        visible = (seq[:, None] == seq[None, :]) & (lo[:, None] <= slot[None, :]) & (slot[None, :] < hi[:, None])
        return _attend(q, k, v, slot, slot, visible, sinks, call).reshape(num_rows, -1), None

    block = rows.block_tables[seq, slot // call.block_len]
    # Padding rows write outside the array, which scatter drops.
    block = jnp.where(jnp.arange(num_rows) < rows.counts[0], block, cache.shape[2])
    place = (layer, slice(None), block, slot % call.block_len)
    cache = cache.at[place].set(jnp.stack([k, v], axis=1).astype(cache.dtype), mode="drop")
    pages = cache[layer]

    def one_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q_row, slot_row, lo_row, hi_row, seq_row = row
        keys, values = pages[:, rows.block_tables[seq_row]].astype(jnp.float32).reshape(2, -1, num_kv_heads, head_dim)
        slots = jnp.arange(keys.shape[0])
        visible = (lo_row <= slots) & (slots < hi_row)
        values = jnp.where(visible[:, None, None], values, 0.0)  # what lies past the end may be anything
        return _attend(q_row[None], keys, values, slot_row[None], slots, visible[None], sinks, call)[0]

    out = jax.lax.map(one_row, (q, slot, lo, hi, seq), batch_size=min(num_rows, ROWS_AT_ONCE))
    return out.reshape(num_rows, -1), cache


def _normalise(norm: Any, heads: jax.Array, call: Any) -> jax.Array:
    """heads [T, N, H], each or all of them together."""
    shape = heads.shape if call.qk_norm != "all_heads" else (heads.shape[0], -1)
    return norm(heads.reshape(shape)).reshape(heads.shape)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_slot: jax.Array,
    k_slot: jax.Array,
    visible: jax.Array,
    sinks: jax.Array | None,
    call: Any,
) -> jax.Array:
    """q [T, N, H], k and v [S, K, H], their slots [T] and [S], visible [T, S] -> [T, N, H]. Nothing seen gives 0."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    s = jnp.einsum("TKGH,SKH->TKGS", grouped, k, precision="highest") * call.scale
    if call.soft_cap is not None:
        s = call.soft_cap * jnp.tanh(s / call.soft_cap)
    if call.alibi_scale is not None:
        slopes = call.alibi_scale * jnp.asarray(alibi_slopes(num_heads), jnp.float32).reshape(1, num_kv_heads, -1, 1)
        s = s + slopes * (k_slot[None, :] - q_slot[:, None]).astype(jnp.float32)[:, None, None, :]
    s = jnp.where(visible[:, None, None, :], s, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    if sinks is not None:
        sink = sinks.reshape(1, num_kv_heads, -1, 1)
        largest = jnp.maximum(largest, sink)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    p = jnp.exp(s - largest)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - largest)
    p = p / jnp.maximum(total, 1e-30)
    return jnp.einsum("TKGS,SKH->TKGH", p, v, precision="highest").reshape(num_rows, num_heads, head_dim)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head [N] (Press et al. 2022): powers of 2^(-8 / n), for n the largest power of two up to N; further
    heads take every other power of 2^(-4 / n)."""
    whole = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return first + [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
