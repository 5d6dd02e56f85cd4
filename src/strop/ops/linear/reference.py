"""Linear layers in plain jnp: the definition, and what runs where there is no kernel."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.norm.reference import rms_norm
from strop.ops.weights import Weight


def declines(call: Any) -> str | None:
    """Serves dense weights only."""
    return None if call.format == "dense" else f"format {call.format!r} is packed for the native kernels"


def linear(
    x: jax.Array,
    weight: Weight,
    index: int,
    counts: jax.Array | None,
    layer: int,
    norm: Any,
    bias: jax.Array | None,
    residual: jax.Array | None,
    swiglu: bool,
    count_index: int,
    row_ids: jax.Array | None,
) -> jax.Array:
    """See strop.ops.linear.linear. A weight of 16 bits multiplies an input rounded to its type."""
    del counts, count_index
    if row_ids is not None:
        x = x[row_ids]
    if norm is not None:
        x = rms_norm(x, norm.weight[layer], norm.eps)
    matrix = jnp.asarray(weight.data)[index]
    precision = jax.lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else None
    y = jax.lax.dot_general(
        x.astype(matrix.dtype),
        matrix,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y = y + bias[layer][None, :]
    if swiglu:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if residual is None else residual + y
