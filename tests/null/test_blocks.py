"""The block pool against its own books."""

import random

import pytest

from strop.core.errors import CapacityError
from strop.engine.blocks import NULL_BLOCK, BlockPool, block_key


def keys_of(*chunks: tuple[int, ...]) -> list[bytes]:
    keys, parent = [], b""
    for chunk in chunks:
        parent = block_key(parent, chunk, len(chunk))
        keys.append(parent)
    return keys


def test_every_block_but_the_null_block_is_handed_out_once() -> None:
    pool = BlockPool(5, 4, True)
    blocks = [pool.allocate() for _ in range(pool.num_usable)]
    assert sorted(blocks) == [1, 2, 3, 4] and NULL_BLOCK not in blocks and pool.num_free == 0
    with pytest.raises(CapacityError, match="all 4 cache blocks are held"):
        pool.allocate()
    pool.release(blocks)
    assert pool.num_free == 4
    pool.check([])


@pytest.mark.parametrize(("num_blocks", "block_len"), [(1, 4), (0, 4), (4, 0)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_len: int) -> None:
    with pytest.raises(CapacityError, match=f"num_blocks={num_blocks}, block_len={block_len}"):
        BlockPool(num_blocks, block_len, True)


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(3, 4, False)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([block])


def test_keys_name_the_whole_prefix() -> None:
    a = keys_of((1, 2), (3, 4))
    assert a == keys_of((1, 2), (3, 4))
    assert a[1] != keys_of((9, 2), (3, 4))[1]
    assert a[1] != keys_of((3, 4))[0]
    assert block_key(b"", (1, 2), 1) != block_key(b"", (1, 2), 2)
    assert block_key(b"", (1, 2), 2) != block_key(b"", (2, 1, 2), 2)
    assert len(a[0]) == 32


def test_published_blocks_survive_release_and_are_found_again() -> None:
    pool = BlockPool(4, 2, True)
    keys = keys_of((1, 2), (3, 4), (5, 6))
    blocks = [pool.allocate(), pool.allocate()]
    for block, key in zip(blocks, keys, strict=False):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.match(keys) == blocks and pool.num_free == 3 and pool.num_free_among(blocks) == 2
    pool.share(blocks)
    assert pool.num_free == 1 and pool.num_free_among(blocks) == 0
    pool.check([blocks])


def test_eviction_takes_blank_blocks_first_then_the_tail_of_the_oldest_prefix() -> None:
    pool = BlockPool(6, 2, True)
    old, new = keys_of((1, 1), (2, 2)), keys_of((3, 3), (4, 4))
    for keys in (old, new):
        blocks = [pool.allocate(), pool.allocate()]
        for block, key in zip(blocks, keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)
    held = [pool.allocate()]  # the one blank block
    assert len(pool.match(old)) == len(pool.match(new)) == 2
    held.append(pool.allocate())
    assert len(pool.match(old)) == 1 and len(pool.match(new)) == 2
    held.append(pool.allocate())
    assert len(pool.match(old)) == 0 and len(pool.match(new)) == 2
    pool.check([held])


def test_the_first_copy_of_a_key_serves() -> None:
    pool = BlockPool(4, 2, True)
    (key,) = keys_of((1, 2))
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, key)
    pool.publish(second, key)
    pool.release([second])
    assert pool.match([key]) == [first]
    pool.release([first])
    pool.check([])


def test_without_a_prefix_cache_nothing_is_published() -> None:
    pool = BlockPool(3, 2, False)
    (key,) = keys_of((1, 2))
    block = pool.allocate()
    pool.publish(block, key)
    assert pool.match([key]) == []


def test_forget_unpublishes_held_and_free_blocks() -> None:
    pool = BlockPool(4, 2, True)
    keys = keys_of((1, 2), (3, 4))
    blocks = [pool.allocate(), pool.allocate()]
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks[1:])
    pool.forget()
    assert pool.match(keys) == [] and pool.num_free == 2
    pool.check([blocks[:1]])


def published(pool: BlockPool, keys: list[bytes]) -> list[int]:
    table = [pool.allocate() for _ in keys]
    for block, key in zip(table, keys, strict=True):
        pool.publish(block, key)
    return table


@pytest.mark.parametrize(
    ("window_len", "num_computed", "first"),
    [(None, 100, 0), (1, 0, 0), (1, 3, 0), (1, 4, 1), (5, 7, 0), (5, 8, 1), (5, 11, 1), (5, 12, 2), (200, 100, 0)],
)
def test_the_first_visible_block(window_len: int | None, num_computed: int, first: int) -> None:
    """Blocks of 4; the next query sees itself and the window_len - 1 tokens before it."""
    assert BlockPool(3, 4, True, window_len).first_visible(num_computed) == first


def test_a_window_frees_what_it_has_passed_and_keeps_it_findable() -> None:
    pool = BlockPool(5, 2, True, window_len=3)
    keys = keys_of((1, 1), (2, 2), (3, 3), (4, 4))
    table = published(pool, keys)
    blocks = list(table)
    pool.slide(table, 0, 3)
    assert table == blocks
    pool.slide(table, 3, 6)
    assert table == [NULL_BLOCK, NULL_BLOCK, *blocks[2:]] and pool.num_free == 2
    pool.check([table])
    pool.release(table)
    assert pool.num_free == 4
    assert pool.match(keys) == [NULL_BLOCK] * 3 + blocks[3:]
    assert pool.match(keys[:2]) == [NULL_BLOCK, blocks[1]]


def test_a_windowed_prefix_needs_only_what_its_end_sees() -> None:
    pool = BlockPool(7, 2, True, window_len=4)  # after 2 n tokens, 3 of them are visible: 2 blocks
    keys = keys_of(*((i, i) for i in range(6)))
    blocks = published(pool, keys)
    for evicted, hits in ((5, 5), (0, 5), (4, 4), (3, 3), (2, 0)):
        pool._unpublish(blocks[evicted])
        table = pool.match(keys)
        assert len(table) == hits
        assert table == [NULL_BLOCK] * max(0, hits - 2) + blocks[max(0, hits - 2) : hits]
    pool.share([NULL_BLOCK, NULL_BLOCK])
    pool.release([NULL_BLOCK])
    assert pool.num_free_among([NULL_BLOCK]) == 0
    pool.check([blocks])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books_and_never_forges_contents(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12, 2, True)
    contents: dict[int, bytes] = {}  # what a block holds, by the key it would have
    tables: list[list[int]] = []
    for _ in range(2000):
        action = rng.random()
        if action < 0.45:
            keys = keys_of(*((rng.randrange(3),) * 2 for _ in range(rng.randint(1, 4))))
            shared = pool.match(keys)
            assert [contents[block] for block in shared] == keys[: len(shared)]
            num_new = len(keys) - len(shared)
            if pool.num_free - pool.num_free_among(shared) < num_new:
                continue
            pool.share(shared)
            table = shared + [pool.allocate() for _ in range(num_new)]
            for block, key in list(zip(table, keys, strict=True))[len(shared) :]:
                contents[block] = key
                pool.publish(block, key)
            tables.append(table)
        elif action < 0.55 and tables:
            fork = list(rng.choice(tables))
            pool.share(fork)
            tables.append(fork)
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
    for table in tables:
        pool.release(table)
    assert pool.num_free == pool.num_usable
    pool.check([])
