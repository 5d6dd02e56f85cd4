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
    x: jax.Array,
    scores: jax.Array,
    counts: jax.Array | None,
    gate_up: tuple[Weight, int],
    down: tuple[Weight, int],
    call: Any,
    operands: Any,
) -> jax.Array:
    """See strop.ops.experts.experts."""
    del counts
    stacks: list[jax.Array] = [
        jnp.asarray(weight.data)[first : first + call.num_experts] for weight, first in (gate_up, down)
    ]
    if operands.biases is None:
        stacks += [jnp.zeros(stack.shape[:2]) for stack in stacks]
    else:
        stacks += [stack[call.layer] for stack in operands.biases]

    def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        share, matrix_in, matrix_out, bias_in, bias_out = expert
        activated = _activated(product(x, matrix_in) + bias_in[None, :], call)
        return total + share[:, None] * (product(activated, matrix_out) + bias_out[None, :]), None

    start = jnp.zeros_like(x) if operands.residual is None else operands.residual
    total, _ = jax.lax.scan(add, start, (call.scale * _shares(scores, call).T, *stacks))
    return total


def _activated(y: jax.Array, call: Any) -> jax.Array:
    gate, up = jnp.split(y, 2, axis=-1)
    if call.gate_limit is not None:
        gate, up = jnp.minimum(gate, call.gate_limit), jnp.clip(up, -call.gate_limit, call.gate_limit) + 1.0
    return ACTIVATIONS[call.activation](gate) * up


def _shares(scores: jax.Array, call: Any) -> jax.Array:
    """The weight [T, E] of each expert for each row: 0 for those it did not choose."""
    _, chosen = jax.lax.top_k(scores, call.num_active)
    shares = jax.nn.softmax(scores, axis=-1)
    best = jnp.take_along_axis(shares, chosen, axis=-1)
    if call.normalise:
        best = best / jnp.sum(best, axis=-1, keepdims=True)
    return jnp.zeros_like(shares).at[jnp.arange(call.num_rows)[:, None], chosen].set(best)
