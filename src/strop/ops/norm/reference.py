"""Normalisation in float32."""

from typing import Any

import jax
import jax.numpy as jnp


def add_norm(x: jax.Array, norm: Any, counts: jax.Array, residual: jax.Array | None, call: Any) -> jax.Array:
    """See strop.ops.norm.add_norm."""
    del counts
    y = call.scale * (x if norm is None else norm(x))
    return y if residual is None else residual + y


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D]; float32 in, out and between."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight [D] + bias [D] over x [..., D]; float32 in, out and between."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = rms_norm(centred, weight, eps)
    return y if bias is None else y + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
