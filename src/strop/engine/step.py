"""The compiled step: forward, logits of the wanted rows, sampling. The caches are donated in and returned."""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from strop.engine.layouts import StepLayouts
from strop.engine.pack import StepShape
from strop.models import decoder
from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.sharding import cache_spec, make_mesh, new_sharded_caches, on_mesh, parameter_specs
from strop.models.spec import ModelSpec
from strop.ops import native
from strop.ops.attention import Rows, block_axis, new_cache
from strop.ops.bound import bind_native
from strop.ops.dispatch import Platform
from strop.ops.program import string_calls
from strop.ops.sample import SampleInputs, SampleOutputs
from strop.ops.sample.op import greedy, sample

Caches = tuple[jax.Array, ...]
"""The cache array of each group of layers (strop.models.cache)."""


def unpack(ints: jax.Array, shape: StepShape) -> tuple[Rows, jax.Array]:
    """The packed int32 array as token rows and the indices of the logits rows [S]."""
    at = 6 * shape.num_rows
    counts = ints[at : at + 2]
    logit_rows = ints[at + 2 : at + 2 + shape.num_seqs]
    tables = ints[at + 2 + shape.num_seqs :].reshape(shape.num_groups, shape.num_seqs, shape.table_len)
    return Rows(ints[:at].reshape(6, shape.num_rows), tables, counts), logit_rows


class CompiledModel:
    """A model's steps, one per bucket: bound to the native library where it can do all of a step, else compiled by XLA.

    The arrays are passed as a plain list: jax hashes and compares every static value and every tree on each call, which
    for a spec of many layers takes longer than the call itself.
    """

    def __init__(
        self, params: Parameters, spec: ModelSpec, layout: Single | Partition, *, may_change_layout: bool = False
    ) -> None:
        """`params` must be sharded as a Partition says (strop.models.sharding)."""
        self._spec, self._layout = spec, layout
        self._layouts = StepLayouts(params, spec, layout, may_change=may_change_layout)
        self._param_specs: Any = None
        if isinstance(layout, Partition):
            self._param_specs = jax.tree.leaves(parameter_specs(params, spec, layout))
        self._cache_dtype = params.weights["embed"].parts[0].data.dtype
        self._arrays, self._tree = jax.tree.flatten(params)
        self._calls: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def new_caches(self, num_blocks: Sequence[int]) -> Caches:
        """Empty ones, with so many blocks for each group of layers."""
        layout = self._layout
        if isinstance(layout, Partition):
            return new_sharded_caches(self._spec, layout, make_mesh(layout.mesh), num_blocks, self._cache_dtype)
        return tuple(
            new_cache(
                layout.platform,
                len(group.layers),
                count,
                group.num_kv_heads,
                group.head_dim,
                layout.block_len,
                self._cache_dtype,
                layout.kv_dtype,
            )
            for group, count in zip(cache_groups(self._spec), num_blocks, strict=True)
        )

    def step(
        self, caches: Caches, ints: np.ndarray, inputs: SampleInputs | None, shape: StepShape, num_top: int
    ) -> tuple[Any, Caches]:
        """One step: SampleOutputs of the S rows, and the caches, which are donated in.

        `inputs=None` when every row is plainly greedy: then just the token ids [S] come back.
        """

        layout = self._layouts.of(shape.num_rows)

        def step(arrays: list[jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
            caches, (ints, *inputs) = args[: shape.num_groups], args[shape.num_groups :]
            params = jax.tree.unflatten(self._tree, arrays)
            rows, logit_rows = unpack(ints, shape)
            hidden, caches = decoder.forward(params, self._spec, rows, caches, layout)
            logits = decoder.logits(params, self._spec, hidden, rows.counts, layout, logit_rows)
            platform = layout.platform
            if not inputs:
                return greedy(logits, rows.counts, platform=platform), *caches
            sampled = sample(logits, SampleInputs(*inputs), rows.counts, num_top=num_top, platform=platform)
            return *sampled, *caches

        sizes = () if inputs is None else (len(inputs.edit_row), inputs.allowed.shape)
        sampled, caches = self._call((shape, num_top, *sizes), step, caches, ints, *(inputs or ()))
        return sampled[0] if inputs is None else SampleOutputs(*sampled), caches

    def logits(self, caches: Caches, ints: np.ndarray, shape: StepShape) -> tuple[jax.Array, Caches]:
        """Logits of every row float32 [T, V], for scoring, and the caches: through the step's kernels."""

        layout = self._layouts.of(shape.num_rows)

        def score(arrays: list[jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
            caches, ints = args[: shape.num_groups], args[shape.num_groups]
            params = jax.tree.unflatten(self._tree, arrays)
            rows, _ = unpack(ints, shape)
            hidden, caches = decoder.forward(params, self._spec, rows, caches, layout)
            counts = jnp.stack([rows.counts[0], rows.counts[0]])
            return decoder.logits(params, self._spec, hidden, counts, layout), *caches

        (logits,), caches = self._call(("logits", shape), score, caches, ints)
        return logits, caches

    def copy_block(self, caches: Caches, group: int, source: int, destination: int) -> Caches:
        """The caches, donated in, with one block of a group copied over another.

        Where attention is sharded over the batch, blocks are counted through all devices, and both lie on one.
        """
        is_divided = isinstance(self._layout, Partition) and self._layout.attention == "batch"
        cache = _copied(caches[group], source, destination, self._layout.platform, is_divided=is_divided)
        return *caches[:group], cache, *caches[group + 1 :]

    def hidden(self, caches: Caches, ints: np.ndarray, shape: StepShape) -> tuple[jax.Array, Caches]:
        """Hidden states of every row after the final norm float32 [T, D], and the caches.

        Without caches (they are empty) the rows attend among themselves, which the native kernels do not do.
        """

        def embed(arrays: list[jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
            *given, ints = args
            params = jax.tree.unflatten(self._tree, arrays)
            rows, _ = unpack(ints, shape)
            hidden, updated = decoder.forward(params, self._spec, rows, tuple(given) or None, self._layout)
            return decoder.final_norm(params, self._spec, hidden, rows.counts, self._layout), *(updated or ())

        (hidden,), caches = self._call(("hidden", shape), embed, caches, ints)
        return hidden, caches

    def _call(
        self, key: tuple[Any, ...], function: Callable[..., Any], caches: Caches, *args: Any
    ) -> tuple[Sequence[Any], Caches]:
        """What `function(arrays, *caches, *args)` returns before the caches, and the caches."""
        key = (key, *(cache.shape for cache in caches))
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._bind(function, caches, *args)
        results = call(*caches, *args)
        num_results = len(results) - len(caches)
        return results[:num_results], tuple(results[num_results:])

    def _bind(self, function: Callable[..., Any], caches: Caches, *args: Any) -> Callable[..., Any]:
        donated = range(1, 1 + len(caches))
        if isinstance(self._layout, Partition):
            sharded = self._on_mesh(function, self._layout, len(caches), len(args))
            return partial(jax.jit(sharded, donate_argnums=donated), self._arrays)
        library = native.library() if self._layout.platform == "native" else None
        bound = None if library is None else bind_native(library, function, self._arrays, *caches, *args)
        return bound or partial(jax.jit(string_calls(function), donate_argnums=donated), self._arrays)

    def _on_mesh(
        self, function: Callable[..., Any], layout: Partition, num_caches: int, num_args: int
    ) -> Callable[..., Any]:
        """The same on every device, each with its parameters and caches and all of the arguments."""

        def step(*args: Any) -> tuple[Any, Any]:
            results = string_calls(function)(*args)
            num_results = len(results) - num_caches
            return results[:num_results], results[num_results:]

        caches = (cache_spec(layout),) * num_caches
        given = self._param_specs, *caches, *(P(),) * num_args
        sharded = on_mesh(step, make_mesh(layout.mesh), given, (P(), caches))
        return lambda *args: tuple(chain(*sharded(*args)))


def _copied(cache: jax.Array, source: int, destination: int, platform: Platform, *, is_divided: bool) -> jax.Array:
    """The cache with one block copied over another."""
    axis = block_axis(platform)
    if platform != "native":
        return _copy_block(cache, source, destination, axis=axis)
    # XLA would make a whole new cache, and with it take the memory of pages that nobody has used yet.
    for shard in cache.block_until_ready().addressable_shards:
        address = shard.data.unsafe_buffer_pointer()
        in_place = np.ctypeslib.as_array((ctypes.c_uint8 * shard.data.nbytes).from_address(address))
        blocks = in_place.reshape(*shard.data.shape[: axis + 1], -1)
        first = (shard.index[axis].start or 0) if is_divided else 0
        if 0 <= source - first < blocks.shape[1]:
            blocks[:, destination - first] = blocks[:, source - first]
    return cache


@partial(jax.jit, static_argnames=("axis",), donate_argnames=("cache",))
def _copy_block(cache: jax.Array, source: Any, destination: Any, *, axis: int) -> jax.Array:
    block = jax.lax.dynamic_slice_in_dim(cache, source, 1, axis)
    return jax.lax.dynamic_update_slice_in_dim(cache, block, destination, axis)
