"""The paged cache's bookkeeping: which block is whose. The cache's contents live elsewhere; here are only block ids.

Each group of layers that see equally far back (strop.models.cache) has a pool of its own.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from strop.core.errors import CapacityError

NULL_BLOCK = 0
"""Never handed out: padding in block tables points here, and so do entries before a window; padding tokens may write
here."""


def block_key(parent: bytes, token_ids: Sequence[int], num_prompt_tokens: int) -> bytes:
    """The name under which a full block is published: SHA-256 over its parent's key and its own tokens.

    A key thus stands for the whole prefix up to the block's end. The first block's parent is the request's salt: who
    has another finds none of these. `num_prompt_tokens` (of `token_ids`) tells apart equal tokens computed as prompt
    and as answer, where the two use different kernels; else pass `len(token_ids)`.
    """
    digest = hashlib.sha256(parent)
    digest.update(array("q", (num_prompt_tokens, *token_ids)))
    return digest.digest()


class BlockPool:
    """Reference-counted blocks of `block_len` tokens; every operation is O(1) per block.

    `num_blocks` counts the cache's physical blocks. Block 0 is reserved (`NULL_BLOCK`): `num_usable = num_blocks - 1`.
    A block is *free* when nobody holds it. A full block may be *published* under its key; a free published block keeps
    its contents until the space is needed, least recently released first, so that `match` can revive it.

    A *table* lists a sequence's blocks; its entries before the window are NULL_BLOCK, which nobody holds.
    """

    __slots__ = (
        "_blank",
        "_block_of_key",
        "_idle",
        "_key_of_block",
        "_num_refs",
        "block_len",
        "num_blocks",
        "prefix_cache",
        "window_len",
    )

    def __init__(self, num_blocks: int, block_len: int, prefix_cache: bool, window_len: int | None = None) -> None:
        """`window_len`: keys visible to a query, itself included; None means all before it."""
        if num_blocks < 2 or block_len < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}, block_len={block_len}: a pool needs at least 2 blocks (one is padding) of "
                "at least 1 token; give the cache more memory"
            )
        self.num_blocks = num_blocks
        self.block_len = block_len
        self.prefix_cache = prefix_cache
        self.window_len = window_len
        self._num_refs = [0] * num_blocks
        self._key_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_key: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))  # free, unpublished; a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, published; oldest first

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out when all are free."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give, cached ones included."""
        return len(self._blank) + len(self._idle)

    def num_free_among(self, table: Iterable[int]) -> int:
        """How many of these (distinct) blocks are free: sharing them lowers `num_free` by as many."""
        return sum(self._num_refs[block_id] == 0 for block_id in table if block_id != NULL_BLOCK)

    def first_visible(self, num_computed_tokens: int) -> int:
        """The first entry of a table that is read once so many tokens are computed."""
        return 0 if self.window_len is None else max(0, num_computed_tokens + 1 - self.window_len) // self.block_len

    def allocate(self) -> int:
        """A private block with undefined contents, held once. Raises CapacityError when none is free."""
        if self._blank:
            block_id = self._blank.pop()
        elif self._idle:
            block_id, _ = self._idle.popitem(last=False)
            self._unpublish(block_id)
        else:
            raise CapacityError(f"all {self.num_usable} cache blocks are held; ask num_free before allocating")
        self._num_refs[block_id] = 1
        return block_id

    def share(self, table: Iterable[int]) -> None:
        """One more holder for each block; free published blocks come back to life."""
        for block_id in table:
            if block_id == NULL_BLOCK:
                continue
            if self._num_refs[block_id] == 0:
                del self._idle[block_id]
            self._num_refs[block_id] += 1

    def release(self, table: Sequence[int]) -> None:
        """One holder less for each block, last block first, so that the front of a prefix is the last to be evicted."""
        for block_id in reversed(table):
            if block_id == NULL_BLOCK:
                continue
            num_refs = self._num_refs[block_id] - 1
            if num_refs < 0:
                raise ValueError(f"block {block_id} was released more often than it was held")
            self._num_refs[block_id] = num_refs
            if num_refs == 0:
                if self._key_of_block[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._idle[block_id] = None

    def slide(self, table: list[int], num_computed_before: int, num_computed_tokens: int) -> None:
        """Release the blocks that fall out of the window as a sequence's computed tokens grow, here in its table."""
        first, end = self.first_visible(num_computed_before), self.first_visible(num_computed_tokens)
        if first < end:
            self.release(table[first:end])
            table[first:end] = [NULL_BLOCK] * (end - first)

    def publish(self, block_id: int, key: bytes) -> None:
        """Make a full, held block findable. A no-op if the key is taken (the first copy serves) or caching is off."""
        if self.prefix_cache and self._key_of_block[block_id] is None and key not in self._block_of_key:
            self._block_of_key[key] = block_id
            self._key_of_block[block_id] = key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """A table for the longest prefix, in whole blocks with these keys, after which a sequence can go on: all that
        is then visible is published. Takes no hold: `share` it to keep."""
        num_hits = i = len(keys)
        while i > (first := self.first_visible(num_hits * self.block_len)):
            i -= 1
            if keys[i] not in self._block_of_key:
                num_hits = i
        return [NULL_BLOCK] * first + [self._block_of_key[key] for key in keys[first:num_hits]]

    def forget(self) -> None:
        """Unpublish every block: the cache's contents are gone. Holds stay as they are."""
        for block_id in self._block_of_key.values():
            self._key_of_block[block_id] = None
        self._block_of_key.clear()
        self._blank.extend(self._idle)
        self._idle.clear()

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise ValueError unless the books agree with `holders`, all tables there are. For tests: O(num_blocks)."""
        num_refs = [0] * self.num_blocks
        for table in holders:
            for block_id in table:
                num_refs[block_id] += block_id != NULL_BLOCK
        free = [*self._blank, *self._idle]
        published = {block_id: key for key, block_id in self._block_of_key.items()}
        for ok, what in (
            (num_refs == self._num_refs, f"holders count {num_refs}, the pool counts {self._num_refs}"),
            (NULL_BLOCK not in free, "the null block is free"),
            (len(free) == len(set(free)), "a block is free twice"),
            (all(num_refs[block_id] == 0 for block_id in free), "a held block is free"),
            (len(free) + sum(n > 0 for n in num_refs) == self.num_usable, "a block is neither held nor free"),
            (
                published == {b: k for b, k in enumerate(self._key_of_block) if k is not None},
                "keys and blocks disagree",
            ),
            (all((b in published) == (b in self._idle) for b in free), "a free block is in the wrong list"),
        ):
            if not ok:
                raise ValueError(f"block pool is inconsistent: {what}")

    def _unpublish(self, block_id: int) -> None:
        key = self._key_of_block[block_id]
        if key is not None:
            del self._block_of_key[key]
            self._key_of_block[block_id] = None
