"""Norms in the native library (native/kernels/norm.cpp), by themselves and as other operations take them."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.program import call_native


def add_norm(x: jax.Array, norm: Any, counts: jax.Array, residual: jax.Array | None, call: Any) -> jax.Array:
    """See strop.ops.norm.add_norm."""
    arrays, attrs = norm_operands(norm)
    added = [] if residual is None else [residual]
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = call_native("norm", [x, counts, *added, *arrays], [out], bool(added), float(call.scale), *attrs)
    return y


def norm_operands(norm: Any) -> tuple[list[jax.Array], tuple[int | float, ...]]:
    """The arrays and the attributes of a norm, or of none, as `take_norm` in native/ffi/operands.h reads them."""
    if norm is None:
        return [], (False, False, 0, 0, 0.0)
    arrays = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    return arrays, (True, norm.bias is not None, norm.row, ("rms", "layer").index(norm.kind), float(norm.eps))
