"""Which layers share a cache, and how many of its blocks sequences can use. No jax."""

from dataclasses import dataclass

from strop.core.config import EngineConfig
from strop.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with like keys and values that see equally far back.

    They share one cache array, one pool of blocks, and one block table per sequence.
    """

    layers: tuple[int, ...]
    """Ascending; the i-th of them is layer i of the cache array."""
    num_kv_heads: int
    head_dim: int
    window_len: int | None
    """Keys visible to a query, itself included; None means all before it."""

    def bytes_per_token(self, item_bytes: int, scale_bytes: int = 0) -> int:
        """Keys and values of one token in these layers, with a scale for each head's."""
        return 2 * len(self.layers) * self.num_kv_heads * (self.head_dim * item_bytes + scale_bytes)


def cache_groups(spec: ModelSpec) -> tuple[CacheGroup, ...]:
    """Every layer is in one group; groups in the order of their first layers."""
    layers: dict[tuple[int, int, int | None], list[int]] = {}
    for i, layer in enumerate(spec.layers):
        heads = layer.attention
        layers.setdefault((heads.num_kv_heads, heads.head_dim, heads.window_len), []).append(i)
    return tuple(CacheGroup(tuple(indices), *key) for key, indices in layers.items())


def num_live_blocks(num_tokens: int, block_len: int, window_len: int | None, step_tokens: int = 1) -> int:
    """The most blocks that a sequence of so many tokens holds at once, with steps of up to `step_tokens` of them.

    A step of n tokens reads and writes window_len - 1 + n slots in a row, which may begin at the end of a block.
    """
    num_blocks = -(-num_tokens // block_len)
    if window_len is None:
        return num_blocks
    return min(num_blocks, (window_len + step_tokens - 3) // block_len + 2)


def num_pool_blocks(config: EngineConfig, window_len: int | None) -> int:
    """Blocks of a group's cache: `config.num_blocks`, or fewer where its windows cannot use as many.

    Windowed layers get what all sequences hold at once between steps, as much again for windows at the ends of cached
    prefixes, and a step's tokens.
    """
    if window_len is None:
        return config.num_blocks
    per_seq = num_live_blocks(config.max_context_len, config.block_len, window_len)
    num_windows = config.max_num_seqs * (2 if config.prefix_cache else 1)
    return min(config.num_blocks, 1 + num_windows * per_seq + -(-config.max_step_tokens // config.block_len))
