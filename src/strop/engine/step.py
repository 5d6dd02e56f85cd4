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
from strop.ops.program import string_calls
from strop.ops.sample import SampleInputs, SampleOutputs
from strop.ops.sample.op import greedy, sample


def unpack(ints: jax.Array, shape: StepShape) -> tuple[Rows, jax.Array]:
    """The packed int32 array as token rows and the indices of the logits rows [S]."""
    at = 6 * shape.num_rows
    counts = ints[at : at + 2]
    logit_rows = ints[at + 2 : at + 2 + shape.num_seqs]
    tables = ints[at + 2 + shape.num_seqs :].reshape(shape.num_seqs, shape.table_len)
    return Rows(ints[:at].reshape(6, shape.num_rows), tables, counts), logit_rows


class CompiledModel:
    """A model's compiled steps, one per bucket.

    The arrays are passed as a plain list: jax hashes and compares every static value and every tree on each call, which
    for a spec of many layers takes longer than the call itself.
    """

    def __init__(self, params: Parameters, spec: ModelSpec, layout: Single) -> None:
        self.spec, self.layout = spec, layout
        self.arrays, self._tree = jax.tree.flatten(params)
        self._functions: dict[tuple[Any, ...], Any] = {}

    def step(self, shape: StepShape, num_top: int) -> Any:
        """(arrays, cache, ints, SampleInputs | None) -> (SampleOutputs or token ids [S], cache); cache is donated."""

        def step(
            arrays: list[jax.Array], cache: jax.Array, ints: jax.Array, inputs: SampleInputs | None
        ) -> tuple[SampleOutputs | jax.Array, jax.Array]:
            params = jax.tree.unflatten(self._tree, arrays)
            rows, logit_rows = unpack(ints, shape)
            hidden, cache = decoder.forward(params, self.spec, rows, cache, self.layout)
            logits = decoder.logits(params, self.spec, hidden, rows.counts, self.layout, logit_rows)
            if inputs is None:
                return greedy(logits, rows.counts, platform=self.layout.platform), cache
            return sample(logits, inputs, rows.counts, num_top=num_top, platform=self.layout.platform), cache

        return self._compiled(("step", shape, num_top), step)

    def logits(self, shape: StepShape) -> Any:
        """(arrays, cache, ints) -> (logits of every row float32 [T, V], cache): scoring, through the step's kernels."""

        def score(arrays: list[jax.Array], cache: jax.Array, ints: jax.Array) -> tuple[jax.Array, jax.Array]:
            params = jax.tree.unflatten(self._tree, arrays)
            rows, _ = unpack(ints, shape)
            hidden, cache = decoder.forward(params, self.spec, rows, cache, self.layout)
            counts = jnp.stack([rows.counts[0], rows.counts[0]])
            return decoder.logits(params, self.spec, hidden, counts, self.layout), cache

        return self._compiled(("logits", shape), score)

    def _compiled(self, key: tuple[Any, ...], function: Any) -> Any:
        if key not in self._functions:
            self._functions[key] = jax.jit(string_calls(function), donate_argnums=1)
        return self._functions[key]


def run_step(
    model: CompiledModel, cache: jax.Array, ints: Any, inputs: SampleInputs | None, shape: StepShape, num_top: int
) -> tuple[Any, jax.Array]:
    """One step. `inputs=None` when every row is plainly greedy: then just the token ids [S] come back."""
    return model.step(shape, num_top)(model.arrays, cache, ints, inputs)


def run_logits(model: CompiledModel, cache: jax.Array, ints: Any, shape: StepShape) -> tuple[jax.Array, jax.Array]:
    """Logits of every row, for scoring."""
    return model.logits(shape)(model.arrays, cache, ints)


@partial(jax.jit, static_argnames=("axis",), donate_argnames=("cache",))
def copy_block(cache: jax.Array, source: Any, destination: Any, *, axis: int) -> jax.Array:
    """The cache with one block (an index along `axis`) copied over another, in place."""
    block = jax.lax.dynamic_slice_in_dim(cache, source, 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(cache, block, destination, axis)
