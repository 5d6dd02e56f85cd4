"""Attention over the paged cache in plain jnp: the definition of correct."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.rope.reference import rotate

ROWS_AT_ONCE = 32  # bounds the memory of gathered keys and values


def attention(
    qkv: jax.Array, cache: jax.Array | None, layer: int, rows: Any, rope: Any, call: Any
) -> tuple[jax.Array, jax.Array | None]:
    """See strop.ops.attention.attention. Cache: [L, 2, P, block_len, K, H], any float dtype."""
    _, position, slot, lo, hi, seq = rows.fields
    num_rows, num_heads, num_kv_heads, head_dim = call.num_rows, call.num_heads, call.num_kv_heads, call.head_dim
    heads = qkv.reshape(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
    if rope is not None:
        cos, sin = rope[0][position], rope[1][position]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is None:
        visible = (seq[:, None] == seq[None, :]) & (lo[:, None] <= slot[None, :]) & (slot[None, :] < hi[:, None])
        return _attend(q, k[None], v[None], visible, call.scale).reshape(num_rows, -1), None

    block = rows.block_tables[seq, slot // call.block_len]
    # Padding rows write outside the array, which scatter drops.
    block = jnp.where(jnp.arange(num_rows) < rows.counts[0], block, cache.shape[2])
    place = (layer, slice(None), block, slot % call.block_len)
    cache = cache.at[place].set(jnp.stack([k, v], axis=1).astype(cache.dtype), mode="drop")
    pages = cache[layer]

    def one_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q_row, lo_row, hi_row, seq_row = row
        keys, values = pages[:, rows.block_tables[seq_row]].astype(jnp.float32).reshape(2, -1, num_kv_heads, head_dim)
        slots = jnp.arange(keys.shape[0])
        visible = (lo_row <= slots) & (slots < hi_row)
        values = jnp.where(visible[:, None, None], values, 0.0)  # what lies past the end may be anything
        return _attend(q_row[None], keys[None], values[None], visible[None], call.scale)[0]

    out = jax.lax.map(one_row, (q, lo, hi, seq), batch_size=min(num_rows, ROWS_AT_ONCE))
    return out.reshape(num_rows, -1), cache


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    """q [T, N, H], k and v [1, S, K, H], visible [T, S] -> [T, N, H]; a row that sees nothing gives 0."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    s = jnp.einsum("TKGH,SKH->TKGS", grouped, k[0], precision="highest") * scale
    s = jnp.where(visible[:, None, None, :], s, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    p = jnp.exp(s - jnp.where(jnp.isfinite(largest), largest, 0.0))
    p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), 1e-30)
    return jnp.einsum("TKGS,SKH->TKGH", p, v[0], precision="highest").reshape(num_rows, num_heads, head_dim)
