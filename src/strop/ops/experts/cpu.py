"""Mixtures of experts on packed weights (native/kernels/experts.cpp): only what some row chose is touched."""

from typing import Any

import jax
import jax.numpy as jnp

from strop.ops.linear.cpu import ACTIVATIONS, declines_gate
from strop.ops.program import call_native
from strop.ops.weights import PACKED_FORMATS, Weight


def declines(call: Any) -> str | None:
    """Serves packed weights, tiles of gate and up alternating."""
    for name in (call.format, call.down_format):
        if name not in PACKED_FORMATS:
            return f"format {name!r} is not packed"
    return declines_gate(call.ffn_dim)


def experts(
    x: jax.Array,
    scores: jax.Array,
    counts: jax.Array,
    gate_up: tuple[Weight, int],
    down: tuple[Weight, int],
    call: Any,
    operands: Any,
) -> jax.Array:
    """See strop.ops.experts.experts."""
    (y,) = call_native(
        "experts",
        [x, scores, gate_up[0].data, down[0].data, counts, *jax.tree.leaves(operands)],
        [jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        *_layout(*gate_up), *_layout(*down),
        call.layer, 1 + ACTIVATIONS.index(call.activation), call.num_active, call.normalise,
        *(operand is not None for operand in operands), float(call.gate_limit or 0.0), float(call.scale),
    )  # fmt: skip
    return y


def _layout(weight: Weight, first: int) -> tuple[int, ...]:
    packed = PACKED_FORMATS[weight.format]
    return first, packed.code, packed.zero, weight.num_tiles
