"""Embedding lookup in a packed weight (native/kernels/linear.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.program import call_native
from strop.ops.weights import PACKED_FORMATS, Weight


def declines(call: Any) -> str | None:
    """Serves packed weights only."""
    return None if call.format in PACKED_FORMATS else f"format {call.format!r} is not packed"


def embed(
    tokens: jax.Array,
    weight: Weight,
    counts: jax.Array,
    call: Any,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    """See strop.ops.embed.embed."""
    packed = PACKED_FORMATS[weight.format]
    out = jax.ShapeDtypeStruct((tokens.shape[0], weight.shape[1]), jnp.float32)
    (y,) = call_native(
        "embed",
        [tokens, weight.data, counts, *(array for array in (bias, residual) if array is not None)],
        [out],
        packed.code, packed.zero, weight.num_tiles, float(call.scale), bias is not None, residual is not None,
    )  # fmt: skip
    return y
