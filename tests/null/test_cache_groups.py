"""Which layers share a cache, how much of it sequences can use, and what the memory print says of it."""

from dataclasses import replace

import pytest

from strop.core.config import MIB, EngineConfig
from strop.engine.blocks import BlockPool
from strop.models.cache import CacheGroup, cache_groups, num_live_blocks, num_pool_blocks
from strop.models.memory import GroupMemory, MemoryPlan
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm


def spec_of(*window_lens: int | None) -> ModelSpec:
    norm = Norm("rms", 1e-5)
    layers = tuple(
        LayerSpec(Attention(4, 2, 16, 0.25, None, window_len=window_len), Mlp(96, "silu"), norm, norm)
        for window_len in window_lens
    )
    return ModelSpec(64, 268, layers, norm, True, 4096)


def test_layers_that_see_equally_far_share_a_cache() -> None:
    assert cache_groups(spec_of(None, None, None)) == (CacheGroup((0, 1, 2), 2, 16, None),)
    mixed = spec_of(512, 512, None, 512, 128)
    assert cache_groups(mixed) == (
        CacheGroup((0, 1, 3), 2, 16, 512),
        CacheGroup((2,), 2, 16, None),
        CacheGroup((4,), 2, 16, 128),
    )
    assert [group.bytes_per_token(2) for group in cache_groups(mixed)] == [384, 128, 128]
    wide = replace(mixed.layers[2], attention=replace(mixed.layers[2].attention, head_dim=32))
    assert len(cache_groups(replace(mixed, layers=(*mixed.layers, wide)))) == 4  # other pages


@pytest.mark.parametrize("block_len", [1, 4, 7])
@pytest.mark.parametrize("window_len", [1, 2, 5, 8, 30, None])
@pytest.mark.parametrize("step_tokens", [1, 3, 16])
def test_live_blocks_are_the_most_ever_held(block_len: int, window_len: int | None, step_tokens: int) -> None:
    pool = BlockPool(99, block_len, False, window_len)
    num_tokens, held = 70, 0
    for first_step in range(1, step_tokens + 1):  # every alignment of the steps
        at, count = 0, first_step
        while at < num_tokens:
            end = min(at + count, num_tokens)
            held = max(held, -(-end // block_len) - pool.first_visible(at))
            at, count = end, step_tokens
    assert num_live_blocks(num_tokens, block_len, window_len, step_tokens) == held


def test_windowed_layers_take_no_more_blocks_than_they_can_use() -> None:
    config = EngineConfig(max_num_seqs=4, max_step_tokens=64, max_context_len=4096, num_blocks=513)
    assert num_pool_blocks(config, None) == 513
    assert num_pool_blocks(config, 128) == 1 + 2 * 4 * 5 + 2
    assert num_pool_blocks(replace(config, prefix_cache=False), 128) == 1 + 4 * 5 + 2
    assert num_pool_blocks(config, 4096) == num_pool_blocks(config, 10**6) == 513
    assert num_pool_blocks(replace(config, num_blocks=9), 128) == 9


def plan(*groups: GroupMemory, num_blocks: int) -> MemoryPlan:
    return MemoryPlan(200 * MIB, groups, MIB, 4096, 4, 64, 32, num_blocks, 1000 * MIB, 300 * MIB)


def test_the_print_tells_growing_layers_from_windowed_ones() -> None:
    full, windowed = GroupMemory(None, 4096, 257), GroupMemory(128, 8192, 43)
    plain = plan(full, num_blocks=257)
    assert plain.cache_bytes == 257 * 32 * 4096
    assert "cache up to 32 MiB (4.0 KiB per token, 8,192 tokens)" in plain.describe()
    assert "fits: 2 sequences of 4,096 tokens, or 4 of 2,048" in plain.describe()
    hybrid = plan(full, windowed, num_blocks=257)
    assert hybrid.cache_bytes == 32 * (257 * 4096 + 43 * 8192)
    assert hybrid.visible_bytes(100) == 100 * 12288
    assert hybrid.visible_bytes(1000) == 1000 * 4096 + 128 * 8192
    assert "(4.0 KiB per token, plus 1.2 MiB per sequence in windowed layers, 8,192 tokens)" in hybrid.describe()
    assert "fits: 2 sequences of 4,096 tokens, or 4 of 2,048" in hybrid.describe()
    narrow = plan(windowed, num_blocks=257)
    assert "(1.2 MiB per sequence in windowed layers)" in narrow.describe()
    assert narrow.describe().endswith("fits: 4 sequences of 4,096 tokens")
    tight = plan(full, replace(windowed, num_blocks=10), num_blocks=257)  # 5 blocks for a whole window
    assert "fits: 1 sequence of 4,096 tokens, or 4 of 64" in tight.describe()
