"""Embedding lookup by gather."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.weights import Weight


def declines(call: Any) -> str | None:
    """Serves dense weights only."""
    return None if call.format == "dense" else f"format {call.format!r} is packed for the native kernels"


def embed(
    tokens: jax.Array,
    weight: Weight,
    counts: jax.Array,
    call: Any,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    """See strop.ops.embed.embed."""
    del counts
    y = call.scale * jnp.take(jnp.asarray(weight.data)[0], tokens, axis=0).astype(jnp.float32)
    y = y if bias is None else y + bias
    return y if residual is None else residual + y
