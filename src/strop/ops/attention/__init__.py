"""Rotary positions, the write into the paged cache, and attention over it, as one operation."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from strop.ops.attention import cpu, reference
from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.norm import Norm

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.attention, cpu.declines),
    Implementation("reference", ("xla",), reference.attention),
)

QkNormOver = Literal["head", "each_head", "all_heads"]
Cache = TypeVar("Cache", bound=jax.Array | None)
"""The cache array, or None where there is none: what goes in comes back."""


class Rows(NamedTuple):
    """What a step knows of its T token rows; all int32.

    `fields` [6, T]: token id, rotary position, slot in the sequence's cache, first visible slot, one past the last
    visible slot, row of `block_tables`. A row sees slots [lo, hi), its own included when the cache already holds it.
    """

    fields: jax.Array
    block_tables: jax.Array
    """[S, P] block ids; a sequence's slot s lies in block table[s // block_len] at s % block_len."""
    counts: jax.Array
    """[2] rows in use of T, and of the logits rows."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "attention"
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_len: int
    scale: float
    soft_cap: float | None = None
    alibi_scale: float | None = None
    window_len: int | None = None
    sinks: bool = False
    qk_norm: QkNormOver | None = None


class AttentionOperands(NamedTuple):
    """The arrays that a call may have besides qkv and cache."""

    rope: tuple[jax.Array, jax.Array] | None = None
    """cos and sin tables [positions, rotary_dim / 2]."""
    qk_norm: tuple[Norm, Norm] | None = None
    """For queries and keys, before the rotation: of each head by one weight [H] or by its own [N, H] and [K, H], or of
    all heads together, [N H] and [K H]."""
    sinks: jax.Array | None = None
    """float32 [L, N]: a score per head that only takes its share of the softmax; `layer` picks the row."""


def attention(
    qkv: jax.Array,
    cache: Cache,
    layer: int,
    rows: Rows,
    operands: AttentionOperands,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    block_len: int,
    platform: Platform,
    soft_cap: float | None = None,
    alibi_scale: float | None = None,
    window_len: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Attention output float32 [T, N H] and the cache with this layer's new keys and values.

    Args:
        qkv: float32 [T, (N + 2 K) H], queries, keys and values before norms and rotation.
        cache: see `new_cache`, donated; None attends within the rows alone (training, scoring).
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        alibi_scale: adds alibi_scale * slope * (key's slot - query's slot) to a score; see reference.alibi_slopes.
        window_len: a row sees at most so many slots, its own the last.

    Softmax and sums accumulate in float32. The native kernel rounds queries, keys, values and unnormalised
    probabilities to bf16 and sums in a fixed order; the reference rounds only to the cache's dtype.
    """
    rotary_dim = 0 if operands.rope is None else 2 * int(operands.rope[0].shape[1])
    over: QkNormOver | None = None
    if operands.qk_norm is not None:
        weight = operands.qk_norm[0].weight
        over = "each_head" if weight.ndim == 3 else "head" if weight.shape[-1] == head_dim else "all_heads"
    call = AttentionCall(
        qkv.shape[0],
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        block_len,
        scale,
        soft_cap,
        alibi_scale,
        window_len,
        operands.sinks is not None,
        over,
    )
    return resolve(_IMPLEMENTATIONS, call, platform)(qkv, cache, layer, rows, operands, call)


def new_cache(
    platform: Platform,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_len: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The cache array of `num_layers` like layers. Native: bf16, pages as native/kernels/attention.h lays them out."""
    if platform == "native":
        return cpu.new_cache((num_layers, num_blocks, num_kv_heads, 2, block_len * head_dim))
    return jnp.zeros((num_layers, 2, num_blocks, block_len, num_kv_heads, head_dim), dtype)


def block_axis(platform: Platform) -> int:
    """The axis of the cache array that counts blocks."""
    return 1 if platform == "native" else 2
