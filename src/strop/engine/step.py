"""The compiled step: forward, logits of the wanted rows, sampling. The cache is donated in and returned."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from strop.engine.pack import StepShape
from strop.models import decoder
from strop.models.layout import Single
from strop.models.parameters import Parameters
from strop.models.spec import ModelSpec
from strop.ops.attention import Rows
from strop.ops.sample import SampleInputs, SampleOutputs
from strop.ops.sample.op import greedy, sample


def unpack(ints: jax.Array, shape: StepShape) -> tuple[Rows, jax.Array]:
    """The packed int32 array as token rows and the indices of the logits rows [S]."""
    at = 6 * shape.num_rows
    counts = ints[at : at + 2]
    logit_rows = ints[at + 2 : at + 2 + shape.num_seqs]
    tables = ints[at + 2 + shape.num_seqs :].reshape(shape.num_seqs, shape.table_len)
    return Rows(ints[:at].reshape(6, shape.num_rows), tables, counts), logit_rows


@partial(jax.jit, static_argnames=("spec", "layout", "shape", "num_top"), donate_argnames=("cache",))
def run_step(
    params: Parameters,
    cache: jax.Array,
    ints: jax.Array,
    inputs: SampleInputs | None,
    *,
    spec: ModelSpec,
    layout: Single,
    shape: StepShape,
    num_top: int,
) -> tuple[SampleOutputs | jax.Array, jax.Array]:
    """One step. `inputs=None` when every row is plainly greedy: then just the token ids [S] come back."""
    rows, logit_rows = unpack(ints, shape)
    hidden, cache = decoder.forward(params, spec, rows, cache, layout)
    logits = decoder.logits(params, spec, hidden[logit_rows], rows.counts, layout)
    if inputs is None:
        return greedy(logits, rows.counts, platform=layout.platform), cache
    return sample(logits, inputs, rows.counts, num_top=num_top, platform=layout.platform), cache


@partial(jax.jit, static_argnames=("spec", "layout", "shape"), donate_argnames=("cache",))
def run_logits(
    params: Parameters, cache: jax.Array, ints: jax.Array, *, spec: ModelSpec, layout: Single, shape: StepShape
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [T, V] of every row, for scoring; the same kernels and the same cache as `run_step`."""
    rows, _ = unpack(ints, shape)
    hidden, cache = decoder.forward(params, spec, rows, cache, layout)
    counts = jnp.stack([rows.counts[0], rows.counts[0]])
    return decoder.logits(params, spec, hidden, counts, layout), cache


@partial(jax.jit, static_argnames=("axis",), donate_argnames=("cache",))
def copy_block(cache: jax.Array, source: Any, destination: Any, *, axis: int) -> jax.Array:
    """The cache with one block (an index along `axis`) copied over another, in place."""
    block = jax.lax.dynamic_slice_in_dim(cache, source, 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(cache, block, destination, axis)
