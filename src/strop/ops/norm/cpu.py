"""Norms as the native operations take them."""

from typing import Any

import jax


def norm_operands(norm: Any) -> tuple[list[jax.Array], tuple[int | float, ...]]:
    """The arrays and the attributes of a norm, or of none, as `take_norm` in native/ffi/operands.h reads them."""
    if norm is None:
        return [], (False, False, 0, 0, 0.0)
    arrays = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    return arrays, (True, norm.bias is not None, norm.row, ("rms", "layer").index(norm.kind), float(norm.eps))
