"""A mixture of experts in plain jnp: every expert computes every row, and what was not chosen weighs 0."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.linear.reference import ACTIVATIONS, product
from strop.ops.weights import Weight


def declines(call: Any) -> str | None:
    """Serves dense weights only."""
    return None if call.format == "dense" else f"format {call.format!r} is packed for the native kernels"


def experts(
    x: jax.Array, scores: jax.Array, gate_up: tuple[Weight, int], down: tuple[Weight, int], call: Any
) -> jax.Array:
    """See strop.ops.experts.experts."""
    shares = jax.nn.softmax(scores, axis=-1)
    best, chosen = jax.lax.top_k(shares, call.num_active)
    if call.normalise:
        best = best / jnp.sum(best, axis=-1, keepdims=True)
    weights = jnp.zeros_like(shares).at[jnp.arange(call.num_rows)[:, None], chosen].set(best)
    into, out = (jnp.asarray(weight.data)[first : first + call.num_experts] for weight, first in (gate_up, down))
    activate = ACTIVATIONS[call.activation]

    def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        matrix_in, matrix_out, weight = expert
        gate, up = jnp.split(product(x, matrix_in), 2, axis=-1)
        return total + weight[:, None] * product(activate(gate) * up, matrix_out), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), (into, out, weights.T))
    return total
