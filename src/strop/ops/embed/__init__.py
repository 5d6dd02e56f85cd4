"""Row lookup in the embedding."""

from dataclasses import dataclass

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.embed import cpu, reference
from strop.ops.weights import AnyWeight

_IMPLEMENTATIONS = (
    Implementation("native", ("native",), cpu.embed, cpu.declines),
    Implementation("reference", ("native", "xla"), reference.embed, reference.declines),
)


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "embed"
    num_rows: int
    model_dim: int
    format: str
    scale: float = 1.0


def embed(
    tokens: jax.Array,
    weight: AnyWeight,
    counts: jax.Array,
    *,
    platform: Platform,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """residual + (scale * weight[tokens] + bias): float32 [T, D]. Rows past counts[0] are undefined.

    Args:
        tokens: int32 [T], rows of weight [1, V, D].
        bias: float32 [1, D].
        residual: float32 [T, D].
    """
    call = EmbedCall(tokens.shape[0], weight.shape[1], weight.format, scale)
    return resolve(_IMPLEMENTATIONS, call, platform)(tokens, weight, counts, call, bias, residual)
