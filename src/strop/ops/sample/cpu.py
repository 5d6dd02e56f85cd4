"""Sampling by the native kernel (native/kernels/sample.cpp)."""

import jax
import jax.numpy as jnp

from strop.ops.program import call_native
from strop.ops.sample import SampleInputs, SampleOutputs


def sample(logits: jax.Array, inputs: SampleInputs, counts: jax.Array, num_top: int) -> SampleOutputs:
    """See strop.ops.sample.op.sample."""
    num_rows = logits.shape[0]
    outs = [
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        jax.ShapeDtypeStruct((num_rows, num_top), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, num_top), jnp.float32),
    ]
    return SampleOutputs(*call_native("sample", [logits, *inputs, counts], outs, num_top))


def greedy(logits: jax.Array, counts: jax.Array) -> jax.Array:
    """See strop.ops.sample.op.greedy."""
    out = jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32)
    (token_ids,) = call_native("greedy", [logits, counts], [out])
    return token_ids
