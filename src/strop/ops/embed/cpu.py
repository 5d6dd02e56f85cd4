"""Embedding lookup in a packed weight (native/kernels/linear.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from strop.ops.weights import PACKED_FORMATS, Weight


def declines(call: Any) -> str | None:
    """Serves packed weights only."""
    return None if call.format in PACKED_FORMATS else f"format {call.format!r} is not packed"


def embed(tokens: jax.Array, weight: Weight, counts: jax.Array) -> jax.Array:
    """See strop.ops.embed.embed."""
    packed = PACKED_FORMATS[weight.format]
    out = jax.ShapeDtypeStruct((tokens.shape[0], weight.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("strop_embed", out)(
        tokens,
        weight.data,
        counts,
        format=np.int32(packed.code),
        zero=np.int32(packed.zero),
        num_tiles=np.int32(weight.num_tiles),
    )
