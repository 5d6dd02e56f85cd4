"""What a model takes, computed before anything is loaded."""

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

from strop.core.config import GIB, MIB, EngineConfig
from strop.core.errors import CapacityError
from strop.machine.memory import library_bytes
from strop.models.cache import cache_groups, num_live_blocks, num_pool_blocks
from strop.models.mesh import MeshPart, of_one_device, stored_axes, with_caches_of
from strop.models.params import inventory
from strop.models.reader import ParameterReader
from strop.models.spec import LayerSpec, ModelSpec
from strop.ops.cost import KV_BYTES
from strop.ops.dispatch import Platform

RUNTIME_BYTES = 90 * MIB
"""Python, jax and the compiled steps of a process that serves one model, without libraries, weights, cache and
tokenizer."""

LIBRARY_BYTES = 105 * MIB
"""What is in memory of a process's libraries when it has imported jax, at least (strop.machine.memory)."""

TOKENIZER_BYTES = 280
"""Of a tokenizer, per entry of its vocabulary."""

MESH_RUNTIME_BYTES, DEVICE_RUNTIME_BYTES = 85 * MIB, 35 * MIB
"""What a mesh adds: steps that XLA compiles and runs, and each device of this process."""

GATHERS_RUNTIME_BYTES = 300 * MIB
"""What compiling takes on top where each matrix is gathered."""

XLA_RUNTIME_BYTES = 800 * MIB
"""The same without native kernels: XLA's compiler and the scratch of its matrix products come on top."""


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The cache of the layers that see equally far back (strop.models.cache)."""

    window_len: int | None
    bytes_per_token: int
    """Of all these layers together."""
    num_blocks: int
    """The null block included."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes go."""

    weight_bytes: int
    groups: tuple[GroupMemory, ...]
    activation_bytes: int
    max_context_len: int
    max_num_seqs: int
    max_step_tokens: int
    block_len: int
    num_blocks: int
    """As EngineConfig means it: of each layer that sees the whole context."""
    limit_bytes: int
    runtime_bytes: int
    num_shards: int = 1
    """Devices with sequences of their own in blocks of their own; the bytes per token are those of all together."""

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all blocks of all layers."""
        return sum(group.num_blocks * self.block_len * group.bytes_per_token for group in self.groups)

    @property
    def cache_bytes_per_token(self) -> int:
        """By which a sequence's cache grows with each token, without end."""
        return sum(group.bytes_per_token for group in self.groups if group.window_len is None) // self.num_shards

    @property
    def window_bytes_per_seq(self) -> int:
        """The most that a sequence takes in layers with a window."""
        return sum(
            num_live_blocks(self.max_context_len, self.block_len, group.window_len)
            * self.block_len
            * group.bytes_per_token
            // self.num_shards
            for group in self.groups
            if group.window_len is not None
        )

    @property
    def total_bytes(self) -> int:
        """The whole process."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes + self.runtime_bytes

    def visible_bytes(self, context_len: int) -> int:
        """Keys and values that the last of so many tokens sees."""
        total = sum(group.bytes_per_token * min(context_len, group.window_len or context_len) for group in self.groups)
        return total // self.num_shards

    def longest(self, num_seqs: int) -> int:
        """Tokens that each of so many sequences may have at the same time, while one of them computes its prompt."""
        fits = self.max_context_len
        num_seqs = -(-num_seqs // self.num_shards)  # of a device
        for group in self.groups:
            resting, working = (
                num_live_blocks(fits, self.block_len, group.window_len, step_tokens)
                for step_tokens in (1, self.max_step_tokens)
            )
            if (num_seqs - 1) * resting + working > group.num_blocks - 1:
                fits = (group.num_blocks - 1) // num_seqs * self.block_len
        return fits

    def describe(self) -> str:
        """A few lines for people: what is taken, and the longest context x concurrency that fits."""
        parts = []
        if self.cache_bytes_per_token:
            cache_tokens = (self.num_blocks - 1) * self.block_len * self.num_shards
            parts += [f"{self.cache_bytes_per_token / 1024:.1f} KiB per token", f"{cache_tokens:,} tokens"]
        if self.window_bytes_per_seq:
            plus = "plus " if parts else ""
            parts.insert(1, f"{plus}{_size(self.window_bytes_per_seq)} per sequence in windowed layers")
        longest = self.longest(1)
        at_full_len = max(n for n in range(1, self.max_num_seqs + 1) if self.longest(n) == longest)
        fits = f"{at_full_len} sequence{'s' if at_full_len > 1 else ''} of {longest:,} tokens"
        if at_full_len < self.max_num_seqs:
            fits += f", or {self.max_num_seqs} of {self.longest(self.max_num_seqs):,}"
        return (
            f"memory: weights {_size(self.weight_bytes)}, cache up to {_size(self.cache_bytes)} "
            f"({', '.join(parts)}), activations {_size(self.activation_bytes)}, runtime {_size(self.runtime_bytes)}; "
            f"in all {_size(self.total_bytes)} of {_size(self.limit_bytes)}\n"
            f"fits: {fits}"
        )


def _size(num_bytes: int) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / MIB:.{0 if num_bytes >= 10 * MIB else 1}f} MiB"


def _row_len(spec: ModelSpec, layer: LayerSpec, platform: Platform) -> int:
    """Numbers that a token's row takes at once while a layer computes."""
    heads = layer.attention
    qkv = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    num_experts = 0 if layer.experts is None else layer.experts.num_experts
    if platform == "native":  # what attention or a gate makes lies beside x; the input of a product also in 8 bits
        made = max(qkv + heads.num_heads * heads.head_dim, layer.mlp.ffn_dim, num_experts)
        return 2 * spec.model_dim + made + made // 3
    return 4 * spec.model_dim + 2 * max(qkv, 2 * layer.mlp.ffn_dim, num_experts)


def _num_gathered(part: MeshPart) -> int:
    """Devices whose shards of a weight each of them gathers; 1 where all stay."""
    stored = {*part.placement.embed, *part.placement.ffn}
    return part.mesh.size(stored & {*part.placement.rows})


def _gathered_bytes(spec: ModelSpec, weights: int, part: MeshPart) -> int:
    """What a device gathers of the largest layer's weights: as they arrive, and in order."""
    if _num_gathered(part) == 1:
        return 0
    matrices = {path: math.prod(info.shape) for path, info in inventory(spec).items() if len(info.shape) > 1}
    of_layers = Counter[str]()
    for path, size in matrices.items():
        if path.startswith("layers."):
            of_layers[path.split(".")[1]] += size
    largest = max(of_layers.values()) / sum(matrices.values())
    return math.ceil(2 * largest * weights / part.num_devices * _num_gathered(part))


def weight_bytes(
    reader: ParameterReader, platform: Platform, dense_item_bytes: int, part: MeshPart | None = None
) -> int:
    """Bytes of the loaded parameters: packed tiles on the native platform, dense arrays elsewhere."""
    infos, spec = reader.inventory, reader.spec

    def times(path: str) -> float:
        """How often a parameter lies here: once, unless devices share it or have a copy each."""
        if part is None:
            return 1.0
        layer = spec.layers[int(path.split(".")[1]) if path.startswith("layers.") else 0]
        num_kv_heads = layer.attention.num_kv_heads
        return part.num_copies(chain(*stored_axes(infos[path], part.placement, part.mesh, num_kv_heads)))

    vectors = sum(4 * math.prod(info.shape) * times(path) for path, info in infos.items() if len(info.shape) == 1)
    if platform != "native":
        matrices = {path: info.shape for path, info in infos.items() if len(info.shape) > 1}
        total = sum(dense_item_bytes * math.prod(shape) * times(path) for path, shape in matrices.items())
        return math.ceil(vectors + total)
    from strop.models.load import packed_runs  # and with it jax
    from strop.models.packing import packed_bytes

    def packed_times(path: str) -> float:
        """Devices share the pages of what is neither divided nor, as queries, keys and values are, taken apart."""
        is_whole = part is not None and times(path) == part.num_devices
        return 1.0 if is_whole and path.rpartition(".")[2] not in ("q", "k", "v") else times(path)

    total = 0.0
    for run in packed_runs(reader, spec):
        num_rows = sum(infos[path].shape[0] * packed_times(path) for path in run.paths)
        total += packed_bytes(run.format_name, *run.shape) * num_rows / run.shape[0]
    return math.ceil(vectors + total)


def activation_bytes(
    spec: ModelSpec, config: EngineConfig, platform: Platform, weights: int = 0, part: MeshPart | None = None
) -> int:
    """Of a step of `config.max_step_tokens` rows and the logits of `config.max_num_seqs`.

    Args:
        part: on a mesh, the devices that are counted,
        weights: and the bytes that they have of the parameters, of which they may gather more.
    """
    num_devices, num_rows, gathered = 1, config.max_step_tokens, 0
    if part is not None:
        num_devices, num_rows = part.num_devices, -(-num_rows // part.mesh.size(part.placement.rows))
        gathered = _gathered_bytes(spec, weights, part)
        spec = of_one_device(spec, part)
    widest = max(_row_len(spec, layer, platform) for layer in dict.fromkeys(spec.layers))
    rows = 4 * (num_rows * widest + config.max_num_seqs * spec.vocab_size)
    if platform == "native":
        return num_devices * (rows + gathered)
    from strop.ops.attention.reference import ROWS_AT_ONCE  # and with it jax

    # XLA computes padding too, and gathers the keys and values of some rows at a time, twice.
    per_layer = 2 * max(layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers)
    return num_devices * (4 * rows + 2 * ROWS_AT_ONCE * config.max_context_len * per_layer * 4 + gathered)


def runtime_bytes(spec: ModelSpec, platform: Platform, part: MeshPart | None = None) -> int:
    """Of a process that serves one model, without weights, cache and activations."""
    libraries = max(LIBRARY_BYTES, _library_bytes())
    runtime = XLA_RUNTIME_BYTES + libraries - LIBRARY_BYTES
    if platform == "native":
        runtime = RUNTIME_BYTES + libraries + TOKENIZER_BYTES * spec.vocab_size
    if part is None:
        return runtime
    of_gathers = GATHERS_RUNTIME_BYTES if _num_gathered(part) > 1 else 0
    return runtime + MESH_RUNTIME_BYTES + part.num_devices * DEVICE_RUNTIME_BYTES + of_gathers


@cache
def _library_bytes() -> int:
    """As of the first plan, so that all plans of a process agree."""
    return library_bytes()


def plan_memory(
    reader: ParameterReader,
    spec: ModelSpec,
    config: EngineConfig,
    platform: Platform,
    *,
    available_bytes: int,
    dense_item_bytes: int = 4,
    part: MeshPart | None = None,
) -> MemoryPlan:
    """`fit_memory` with the weights of a checkpoint."""
    return fit_memory(
        weight_bytes(reader, platform, dense_item_bytes, part),
        spec,
        config,
        platform,
        available_bytes=available_bytes,
        dense_item_bytes=dense_item_bytes,
        part=part,
    )


def fit_memory(
    weights: int,
    spec: ModelSpec,
    config: EngineConfig,
    platform: Platform,
    *,
    available_bytes: int,
    dense_item_bytes: int = 4,
    part: MeshPart | None = None,
) -> MemoryPlan:
    """Sizes the cache and checks that everything fits. `config.max_context_len` must be resolved.

    The cache gets what the sequences can use, at most half of what weights and runtime leave.

    Args:
        weights: bytes of the parameters as loaded (`weight_bytes`, or strop.models.abstract.parameter_bytes).
        part: on a mesh, the devices of this process, of which all is counted.

    Raises:
        CapacityError: naming what is needed, what there is, and what to change.
    """
    limit = config.memory_bytes or available_bytes
    kv_bytes = KV_BYTES[config.kv_dtype] if platform == "native" else (dense_item_bytes, 0)

    num_shards = 1 if part is None else part.num_shards
    num_seqs = -(-config.max_num_seqs // num_shards)

    def groups(num_blocks: int) -> tuple[GroupMemory, ...]:
        sized = replace(config, num_blocks=num_blocks, max_num_seqs=num_seqs)
        return tuple(
            GroupMemory(group.window_len, group.bytes_per_token(*kv_bytes), num_pool_blocks(sized, group.window_len))
            for group in cache_groups(spec if part is None else with_caches_of(spec, part))
        )

    def cache_bytes(num_blocks: int) -> int:
        return sum(group.num_blocks * group.bytes_per_token for group in groups(num_blocks)) * config.block_len

    activations = activation_bytes(spec, config, platform, weights, part)
    runtime = runtime_bytes(spec, platform, part)
    room = limit - weights - activations - runtime
    blocks_per_seq = -(-config.max_context_len // config.block_len)
    needed_blocks = num_seqs * blocks_per_seq + 1
    num_blocks = config.num_blocks or bisect_right(range(needed_blocks + 1), max(room // 2, 0), key=cache_bytes) - 1
    if num_blocks < 2 or cache_bytes(num_blocks) > room:
        wanted = cache_bytes(max(config.num_blocks, 2))
        smaller = "num_blocks (to pool: max_context_len)" if config.num_blocks else "max_num_seqs or max_step_tokens"
        raise CapacityError(
            f"the model does not fit: weights {_size(weights)} + runtime {_size(runtime)} + activations "
            f"{_size(activations)} + a cache of at least {_size(wanted)} need "
            f"{_size(weights + runtime + activations + wanted)}, but the limit is {_size(limit)}: raise memory_bytes "
            f"if the machine has more, lower {smaller}, or take a smaller or more strongly quantised model"
        )
    return MemoryPlan(
        weights,
        groups(num_blocks),
        activations,
        config.max_context_len,
        config.max_num_seqs,
        config.max_step_tokens,
        config.block_len,
        num_blocks,
        limit,
        runtime,
        num_shards,
    )
