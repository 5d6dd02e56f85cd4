"""The block pools of all groups of layers as one: what is done to a sequence's tables is done in every group."""

from collections.abc import Iterable, Sequence

from strop.engine.blocks import NULL_BLOCK, BlockPool
from strop.models.cache import num_live_blocks

Tables = list[list[int]]
"""A sequence's blocks in each group."""


class GroupPools:
    """One pool for each group of layers (strop.models.cache); a sequence has a table in each.

    All pools have the same `block_len` and `prefix_cache`. A pool gives no block to a sequence whose table is long
    enough, so tables may be of unlike lengths.
    """

    def __init__(self, pools: Sequence[BlockPool], max_step_tokens: int) -> None:
        self.pools = tuple(pools)
        self.block_len = pools[0].block_len
        self.prefix_cache = pools[0].prefix_cache
        self._max_step_tokens = max_step_tokens
        self._windowed = [(group, pool) for group, pool in enumerate(pools) if pool.window_len is not None]

    def new_tables(self) -> Tables:
        """Tables without a block."""
        return [[] for _ in self.pools]

    def max_tokens(self, limit: int) -> int:
        """The longest that one sequence can get in the whole cache, `limit` at most."""
        for pool in self.pools:
            if self._num_live(pool, limit) > pool.num_usable:
                limit = pool.num_usable * self.block_len
        return limit

    def lengths(self, num_tokens: int, num_computed_tokens: int) -> list[int]:
        """Of tables with all blocks for so many tokens, or as many as the windows of a step can hold."""
        num_blocks = -(-num_tokens // self.block_len)
        return [
            min(num_blocks, pool.first_visible(num_computed_tokens) + self._num_live(pool, num_tokens))
            for pool in self.pools
        ]

    def may_grow(self, tables: Tables, num_computed_tokens: int, num_tokens: int) -> list[bool]:
        """Whether a sequence will hold more blocks than now before it has so many tokens."""
        return [
            len(table) - pool.first_visible(num_computed_tokens)
            < num_live_blocks(num_tokens, self.block_len, pool.window_len)
            for pool, table in zip(self.pools, tables, strict=True)
        ]

    def fits(self, tables: Tables, lengths: Sequence[int], num_spare: Sequence[int]) -> bool:
        """Whether tables, shared or not yet, can be held and extended to these lengths with spare blocks left."""
        return all(
            pool.num_free >= pool.num_free_among(table) + length - len(table) + spare
            for pool, table, length, spare in zip(self.pools, tables, lengths, num_spare, strict=True)
        )

    def extend(self, tables: Tables, lengths: Sequence[int]) -> None:
        """Add private blocks to tables that are shorter."""
        for pool, table, length in zip(self.pools, tables, lengths, strict=True):
            table.extend(pool.allocate() for _ in range(length - len(table)))

    def share(self, tables: Tables) -> None:
        """One more holder for each block."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.share(table)

    def release(self, tables: Tables) -> None:
        """One holder less for each block."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table)

    def slide(self, tables: Tables, num_computed_before: int, num_computed_tokens: int) -> None:
        """Release what windows have passed."""
        for group, pool in self._windowed:
            pool.slide(tables[group], num_computed_before, num_computed_tokens)

    def prefix(self, tables: Tables, num_tokens: int) -> Tables:
        """The blocks of the first tokens that are still visible after them."""
        num_blocks = -(-num_tokens // self.block_len)
        firsts = (min(pool.first_visible(num_tokens), num_blocks) for pool in self.pools)
        return [[NULL_BLOCK] * first + table[first:num_blocks] for first, table in zip(firsts, tables, strict=True)]

    def publish(self, tables: Tables, index: int, key: bytes) -> None:
        """Make a full block findable in every group."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.publish(table[index], key)

    def match(self, keys: Sequence[bytes]) -> Tables:
        """Tables, equally long, for the longest prefix of which every group has what is visible after it."""
        while True:
            tables = [pool.match(keys) for pool in self.pools]
            num_hits = min(map(len, tables))
            if all(len(table) == num_hits for table in tables):
                return tables
            keys = keys[:num_hits]

    def forget(self) -> None:
        """The caches' contents are gone."""
        for pool in self.pools:
            pool.forget()

    def check(self, running: Iterable[tuple[Tables, int]], held: Iterable[Tables]) -> None:
        """Raise ValueError unless the books agree with the tables of running sequences, with their computed tokens, and
        with those that are held besides. For tests: O(num_blocks)."""
        running = list(running)
        for tables, num_computed_tokens in running:
            for pool, table in zip(self.pools, tables, strict=True):
                first = pool.first_visible(num_computed_tokens)
                if any(table[:first]) or NULL_BLOCK in table[first:]:
                    raise ValueError(f"{table} is not what a window sees after {num_computed_tokens} tokens")
        everyone = [*(tables for tables, _ in running), *held]
        for group, pool in enumerate(self.pools):
            pool.check([tables[group] for tables in everyone])

    def _num_live(self, pool: BlockPool, num_tokens: int) -> int:
        """The most of the pool's blocks that a sequence of so many tokens holds at once."""
        return num_live_blocks(num_tokens, self.block_len, pool.window_len, self._max_step_tokens)
