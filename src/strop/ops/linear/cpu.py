"""Linear layers on packed weights (native/kernels/linear.cpp)."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.norm.cpu import norm_operands
from strop.ops.program import call_native
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS, AnyWeight, Weight

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "gelu_sigmoid")  # as native/kernels/linear.h numbers them, from 1


def declines(call: Any) -> str | None:
    """Serves packed weights; see `declines_gate` and `declines_epilogue`."""
    if not set(call.format.split("+")) <= PACKED_FORMATS.keys():
        return f"format {call.format!r} is not packed"
    return declines_gate(call.n_len // 2) if call.gated else None


def declines_gate(ffn_dim: int) -> str | None:
    """A packed gated MLP alternates tiles of 16 gate and up rows."""
    if ffn_dim % TILE_COLUMNS:
        return f"gate and up tiles alternate, so F must be a multiple of {TILE_COLUMNS}, not {ffn_dim}"
    return None


def linear(x: jax.Array, weight: AnyWeight, index: int, counts: jax.Array, call: Any, operands: Any) -> jax.Array:
    """See strop.ops.linear.linear."""
    y: jax.Array | None = None
    first_column = 0
    for part in weight.parts:
        y = _write_columns(y, first_column, x, part, index, counts, call, operands)
        first_column += part.shape[0]
    assert y is not None
    return y


def _write_columns(
    y: jax.Array | None, first_column: int, x: jax.Array, weight: Weight, index: int, counts: jax.Array, call: Any,
    operands: Any,
) -> jax.Array:  # fmt: skip
    """`y` with the columns of one weight written, in place; None: as yet nothing is."""
    packed, gates = PACKED_FORMATS[weight.format], 2 if call.gated else 1
    norm_arrays, norm_attrs = norm_operands(operands.norm)
    optional = (operands.bias, operands.residual, operands.row_ids)
    given = [] if y is None else [y]
    (written,) = call_native(
        "linear",
        [x, weight.data, counts, *given, *norm_arrays, *(operand for operand in optional if operand is not None)],
        [jax.ShapeDtypeStruct((call.num_rows, call.n_len // gates), jnp.float32)],
        index, call.layer, packed.code, packed.zero, weight.num_tiles, call.count_index,
        weight.shape[0] // gates, first_column,
        *(operand is not None for operand in optional),
        0 if call.activation is None else 1 + ACTIVATIONS.index(call.activation), call.gated,
        float(call.scale), float(call.soft_cap or 0.0), *norm_attrs,
        aliases=None if y is None else {3: 0},
    )  # fmt: skip
    return written
