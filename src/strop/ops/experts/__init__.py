"""A mixture of experts: each token through the few gated MLPs that its router scores highest."""

from dataclasses import dataclass

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.experts import reference
from strop.ops.linear import Activation
from strop.ops.weights import AnyWeight

_IMPLEMENTATIONS = (Implementation("reference", ("xla",), reference.experts, reference.declines),)


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "experts"
    num_rows: int
    model_dim: int
    ffn_dim: int
    num_experts: int
    num_active: int
    format: str
    expert_bytes: int
    """Of one expert's matrices."""
    normalise: bool
    activation: Activation


def experts(
    x: jax.Array,
    scores: jax.Array,
    gate_up: tuple[AnyWeight, int],
    down: tuple[AnyWeight, int],
    num_active: int,
    *,
    normalise: bool,
    activation: Activation,
    platform: Platform,
) -> jax.Array:
    """Sum over each row's chosen experts of weight * down(act(gate(x)) * up(x)): float32 [T, D].

    Args:
        x: float32 [T, D], normalised.
        scores: float32 [T, E] of the router; the weights are their softmax.
        gate_up: the stack, [2 F, D] each, and where in it this layer's E experts begin.
        down: the same for [D, F].
        normalise: scale the chosen weights to sum to 1.
    """
    weight, matrix_out = gate_up[0], down[0]
    call = ExpertsCall(
        x.shape[0],
        x.shape[1],
        weight.shape[0] // 2,
        scores.shape[1],
        num_active,
        weight.format,
        weight.bytes_per_matrix + matrix_out.bytes_per_matrix,
        normalise,
        activation,
    )
    return resolve(_IMPLEMENTATIONS, call, platform)(x, scores, gate_up, down, call)
