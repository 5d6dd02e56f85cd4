"""Picking tokens from logits: resolution of the implementation. `reference.py` defines it."""

from dataclasses import dataclass

import jax

from strop.ops.dispatch import Implementation, Platform, resolve
from strop.ops.sample import SampleInputs, SampleOutputs, cpu, reference

_SAMPLE = (
    Implementation("native", ("native",), cpu.sample),
    Implementation(
        "reference", ("xla",), lambda logits, inputs, counts, num_top: reference.sample(logits, inputs, num_top=num_top)
    ),
)
_GREEDY = (
    Implementation("native", ("native",), cpu.greedy),
    Implementation("reference", ("xla",), lambda logits, counts: reference.greedy(logits)),
)


@dataclass(frozen=True, slots=True)
class SampleCall:
    """What is static about one call, for choosing an implementation and counting its cost."""

    op = "sample"
    num_rows: int
    vocab_size: int
    num_top: int


def sample(
    logits: jax.Array, inputs: SampleInputs, counts: jax.Array, *, num_top: int, platform: Platform
) -> SampleOutputs:
    """One token per row of float32 logits [R, V]; counts[1] rows are sampled, the rest are undefined."""
    return resolve(_SAMPLE, _call(logits, num_top), platform)(logits, inputs, counts, num_top)


def greedy(logits: jax.Array, counts: jax.Array, *, platform: Platform) -> jax.Array:
    """The largest logit's token id, i32 [R], ties to the lowest id, -1 for a row with a NaN: plain greedy rows."""
    return resolve(_GREEDY, _call(logits, 0), platform)(logits, counts)


def _call(logits: jax.Array, num_top: int) -> SampleCall:
    num_rows, vocab_size = logits.shape
    return SampleCall(num_rows, vocab_size, num_top)
