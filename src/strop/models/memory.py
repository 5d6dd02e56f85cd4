"""What a model takes, computed before anything is loaded."""

import math
from dataclasses import dataclass

from strop.core.config import GIB, MIB, EngineConfig
from strop.core.errors import CapacityError
from strop.models.reader import ParameterReader
from strop.models.spec import ModelSpec
from strop.ops.dispatch import Platform

RUNTIME_BYTES = 330 * MIB
"""Python, jax and the compiled steps of a process that serves one model, without weights and cache."""

XLA_RUNTIME_BYTES = 800 * MIB
"""The same without native kernels: XLA's compiler and the scratch of its matrix products come on top."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes go."""

    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int
    activation_bytes: int
    max_context_len: int
    max_num_seqs: int
    block_len: int
    num_blocks: int
    limit_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole process."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes + self.runtime_bytes

    def describe(self) -> str:
        """A few lines for people: what is taken, and the longest context x concurrency that fits."""
        cache_tokens = (self.num_blocks - 1) * self.block_len
        at_full_len = max(1, min(self.max_num_seqs, cache_tokens // self.max_context_len))
        return (
            f"memory: weights {_size(self.weight_bytes)}, cache up to {_size(self.cache_bytes)} "
            f"({self.cache_bytes_per_token / 1024:.1f} KiB per token, {cache_tokens:,} tokens), "
            f"activations {_size(self.activation_bytes)}, runtime {_size(self.runtime_bytes)}; "
            f"in all {_size(self.total_bytes)} of {_size(self.limit_bytes)}\n"
            f"fits: {at_full_len} sequences of {min(self.max_context_len, cache_tokens):,} tokens, or "
            f"{self.max_num_seqs} of {min(self.max_context_len, cache_tokens // self.max_num_seqs):,}"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def weight_bytes(reader: ParameterReader, platform: Platform, dense_item_bytes: int) -> int:
    """Bytes of the loaded parameters: packed tiles on the native platform, dense arrays elsewhere."""
    vectors = sum(4 * math.prod(info.shape) for info in reader.inventory.values() if len(info.shape) == 1)
    if platform != "native":
        matrices = [info.shape for info in reader.inventory.values() if len(info.shape) > 1]
        return vectors + sum(dense_item_bytes * math.prod(shape) for shape in matrices)
    from strop.models.load import packed_weight_bytes  # and with it jax

    return vectors + packed_weight_bytes(reader, reader.spec)


def cache_bytes_per_token(spec: ModelSpec, item_bytes: int = 2) -> int:
    """Bytes of keys and values of one token in all layers."""
    return sum(2 * layer.attention.num_kv_heads * layer.attention.head_dim * item_bytes for layer in spec.layers)


def plan_memory(
    reader: ParameterReader,
    spec: ModelSpec,
    config: EngineConfig,
    platform: Platform,
    *,
    available_bytes: int,
    dense_item_bytes: int = 4,
) -> MemoryPlan:
    """Sizes the cache and checks that everything fits. `config.max_context_len` must be resolved.

    The cache gets what the sequences can use, at most half of what weights and runtime leave.

    Raises:
        CapacityError: naming what is needed, what there is, and what to change.
    """
    limit = config.memory_bytes or available_bytes
    weights = weight_bytes(reader, platform, dense_item_bytes)
    per_token = cache_bytes_per_token(spec, 2 if platform == "native" else dense_item_bytes)
    per_block = per_token * config.block_len
    widest = max(
        spec.model_dim * 4
        + max(
            (layer.attention.num_heads + 2 * layer.attention.num_kv_heads) * layer.attention.head_dim,
            2 * layer.mlp.ffn_dim,
        )
        * 2
        for layer in spec.layers
    )
    activations = 4 * (config.max_step_tokens * widest + config.max_num_seqs * spec.vocab_size)
    if platform != "native":  # computes padding too, and gathers the keys and values of some rows at a time, twice
        per_layer = 2 * max(layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)
        from strop.ops.attention.reference import ROWS_AT_ONCE  # and with it jax

        activations = 4 * activations + 2 * ROWS_AT_ONCE * config.max_context_len * per_layer * 4
    runtime = RUNTIME_BYTES if platform == "native" else XLA_RUNTIME_BYTES
    room = limit - weights - activations - runtime
    blocks_per_seq = -(-config.max_context_len // config.block_len)
    needed_blocks = config.max_num_seqs * blocks_per_seq + 1
    num_blocks = config.num_blocks or min(needed_blocks, max(room // 2, 0) // per_block)
    if num_blocks < 2 or num_blocks * per_block > room:
        wanted = max(config.num_blocks, 2) * per_block
        smaller = "num_blocks" if config.num_blocks else "max_num_seqs or max_step_tokens"
        raise CapacityError(
            f"the model does not fit: weights {_size(weights)} + runtime {_size(runtime)} + activations "
            f"{_size(activations)} + a cache of at least {_size(wanted)} need "
            f"{_size(weights + runtime + activations + wanted)}, but the limit is {_size(limit)}: raise memory_bytes "
            f"if the machine has more, lower {smaller}, or take a smaller or more strongly quantised model"
        )
    return MemoryPlan(
        weights,
        per_token,
        num_blocks * per_block,
        activations,
        config.max_context_len,
        config.max_num_seqs,
        config.block_len,
        num_blocks,
        limit,
        runtime,
    )
