"""A mixture of experts: each token through the few gated MLPs that its router scores highest."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.experts import cpu, reference
from strop.ops.linear import Activation
from strop.ops.weights import AnyWeight

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.experts, cpu.declines),
    Implementation("reference", ("native", "xla"), reference.experts, reference.declines),
)


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
    """Of gate and up."""
    down_format: str
    expert_bytes: int
    """Of all weights of one expert, as stored."""
    normalise: bool
    activation: Activation
    gate_limit: float | None = None
    layer: int = 0
    scale: float = 1.0


class ExpertsOperands(NamedTuple):
    """The arrays that a call may have besides input, scores and weights."""

    biases: tuple[jax.Array, jax.Array] | None = None
    residual: jax.Array | None = None


def experts(
    x: jax.Array,
    scores: jax.Array,
    counts: jax.Array,
    gate_up: tuple[AnyWeight, int],
    down: tuple[AnyWeight, int],
    num_active: int,
    *,
    normalise: bool,
    activation: Activation,
    platform: Platform,
    gate_limit: float | None = None,
    layer: int = 0,
    biases: tuple[jax.Array, jax.Array] | None = None,
    scale: float = 1.0,
    residual: jax.Array | None = None,
) -> jax.Array:
    """residual + scale * sum over each row's experts of share * down(act(gate(x)) * up(x)): float32 [T, D].

    A row's experts are those of its `num_active` largest scores, of equal ones the first.

    Args:
        x: float32 [T, D].
        scores: float32 [T, E] of the router; the shares are their softmax.
        counts: int32; counts[0] rows are computed, the rest are undefined.
        gate_up: the stack, [2 F, D] each, and where in it this layer's E experts begin.
        down: the same for [D, F].
        normalise: scale the shares of the chosen to sum to 1.
        gate_limit: gates are at most this, and what they gate is clipped to +-this, plus 1.
        layer: row of the biases.
        biases: of gate and up float32 [L, E, 2 F], and of down [L, E, D]; packed as the weights are.
        residual: float32 like the result.

    A row's sum is taken in the order of its experts. Products round as those of ops.linear do.
    """
    weight = gate_up[0]
    call = ExpertsCall(
        x.shape[0],
        x.shape[1],
        weight.shape[0] // 2,
        scores.shape[1],
        num_active,
        weight.format,
        down[0].format,
        weight.bytes_per_matrix + down[0].bytes_per_matrix,
        normalise,
        activation,
        gate_limit,
        layer,
        scale,
    )
    operands = ExpertsOperands(biases, residual)
    return resolve(_IMPLEMENTATIONS, call, platform)(x, scores, counts, gate_up, down, call, operands)
