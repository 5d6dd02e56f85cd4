"""Linear layers in plain jnp: the definition, and what runs where there is no kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.weights import Weight


def declines(call: Any) -> str | None:
    """Serves dense weights only."""
    return None if call.format == "dense" else f"format {call.format!r} is packed for the native kernels"


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def linear(x: jax.Array, weight: Weight, index: int, counts: jax.Array | None, call: Any, operands: Any) -> jax.Array:
    """See strop.ops.linear.linear. A weight of 16 bits multiplies an input rounded to its type."""
    del counts
    if operands.row_ids is not None:
        x = x[operands.row_ids]
    if operands.norm is not None:
        x = operands.norm(x)
    y = product(x, jnp.asarray(weight.data)[index])
    if operands.bias is not None:
        y = y + operands.bias[call.layer][None, :]
    return finish(y, call, operands.residual)


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [T, K] times matrix [N, K] transposed, in float32."""
    precision = jax.lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(matrix.dtype), matrix, contract, precision=precision, preferred_element_type=jnp.float32
    )


def finish(y: jax.Array, call: Any, residual: jax.Array | None) -> jax.Array:
    """What follows the product and its bias."""
    if call.activation is not None:
        y = activate(y, call.activation, call.gated)
    if call.scale != 1.0:
        y = y * call.scale
    if call.soft_cap is not None:
        y = call.soft_cap * jnp.tanh(y / call.soft_cap)
    return y if residual is None else residual + y


def activate(y: jax.Array, activation: str, gated: bool) -> jax.Array:
    """act(y), or act(gate) * up, which are the halves of y's last axis."""
    if not gated:
        return ACTIVATIONS[activation](y)
    gate, up = jnp.split(y, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up
