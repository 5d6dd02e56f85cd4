"""Normalisation in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D]; float32 in, out and between."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight [D] + bias [D] over x [..., D]; float32 in, out and between."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = rms_norm(centred, weight, eps)
    return y if bias is None else y + bias.reshape((1,) * (x.ndim - 1) + (-1,))
