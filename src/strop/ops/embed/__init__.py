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


def embed(tokens: jax.Array, weight: AnyWeight, counts: jax.Array, *, platform: Platform) -> jax.Array:
    """Rows of weight [1, V, D] for tokens int32 [T]: float32 [T, D]. Rows past counts[0] are undefined."""
    call = EmbedCall(tokens.shape[0], weight.shape[1], weight.format)
    return resolve(_IMPLEMENTATIONS, call, platform)(tokens, weight, counts)
