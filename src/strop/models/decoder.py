"""The decoder: one loop over the layers' data. It names no family."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.models.layout import Single
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.spec import LayerSpec, ModelSpec
from strop.ops.attention import Cache, Rows, attention
from strop.ops.embed import embed
from strop.ops.linear import Norm, linear


def forward(
    params: Parameters,
    spec: ModelSpec,
    rows: Rows,
    cache: Cache,
    layout: Single,
) -> tuple[jax.Array, Cache]:
    """Hidden states float32 [T, D] before the final norm, and the updated cache.

    Args:
        rows: the step's T token rows.
        cache: see ops.attention.cache_shape; None attends within the rows alone.
    """
    x = embed(rows.fields[0], params.weights["embed"], rows.counts, platform=layout.platform)
    for layer, (layer_spec, places) in enumerate(zip(spec.layers, params.layers, strict=True)):
        x, cache = _layer(params, layer, layer_spec, places, x, rows, cache, layout)
    return x, cache


def _layer(
    params: Parameters,
    layer: int,
    spec: LayerSpec,
    places: LayerPlaces,
    x: jax.Array,
    rows: Rows,
    cache: Cache,
    layout: Single,
) -> tuple[jax.Array, Cache]:
    vectors, platform = params.vectors, layout.platform

    def matrix(place: Place, y: jax.Array, **fused: Any) -> jax.Array:
        stack = params.weights[place.stack]
        return linear(y, stack, place.index, rows.counts, platform=platform, layer=layer, **fused)

    norm, heads = spec.norm, spec.attention
    qkv = matrix(places.qkv, x, norm=Norm(vectors["attention_norm"], norm.eps), bias=vectors.get("qkv_bias"))
    attended, cache = attention(
        qkv,
        cache,
        layer,
        _within_window(rows, heads.window_len),
        None if places.rope is None else params.ropes[places.rope],
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        scale=heads.scale,
        block_len=layout.block_len,
        platform=platform,
    )
    x = matrix(places.o, attended, bias=vectors.get("o_bias"), residual=x)
    gated = matrix(
        places.gate_up, x, norm=Norm(vectors["mlp_norm"], norm.eps), bias=vectors.get("gate_up_bias"), swiglu=True
    )
    return matrix(places.down, gated, bias=vectors.get("down_bias"), residual=x), cache


def _within_window(rows: Rows, window_len: int | None) -> Rows:
    """Rows that see at most the last `window_len` slots, their own included."""
    if window_len is None:
        return rows
    slot, lo = rows.fields[2], rows.fields[3]
    return rows._replace(fields=rows.fields.at[3].set(jnp.maximum(lo, slot + 1 - window_len)))


def logits(
    params: Parameters,
    spec: ModelSpec,
    hidden: jax.Array,
    counts: jax.Array,
    layout: Single,
    row_ids: jax.Array | None = None,
) -> jax.Array:
    """float32 [R, V]: final norm and head, for the rows `row_ids` [R] of hidden states [T, D] or for all of them.

    counts[1] rows are computed.
    """
    head = params.weights["embed" if spec.tied_embeddings else "head"]
    norm = Norm(params.vectors["final_norm"], spec.final_norm.eps)
    return linear(hidden, head, 0, counts, platform=layout.platform, norm=norm, count_index=1, row_ids=row_ids)
