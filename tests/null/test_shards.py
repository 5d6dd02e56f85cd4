"""Schedulers that share a step: each with its own sequences and blocks, joined into one plan and told apart again."""

import random
from itertools import count

import numpy as np
import pytest
from test_scheduler import request

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.engine.blocks import BlockPool
from strop.engine.pack import Packer
from strop.engine.scheduler import Scheduler
from strop.engine.shards import ShardedScheduler, config_of_shard
from strop.engine.step_plan import StepPlan

BLOCK_LEN, NUM_BLOCKS = 4, 9
CONFIG = EngineConfig(
    max_num_seqs=6,
    max_step_tokens=24,
    max_chunk_tokens=9,
    max_context_len=24,
    block_len=BLOCK_LEN,
    num_blocks=NUM_BLOCKS,
)


def sharded(num_shards: int = 3) -> ShardedScheduler:
    seq_ids = count()
    own = config_of_shard(CONFIG, num_shards)
    pools = [[BlockPool(NUM_BLOCKS, BLOCK_LEN, True, None)] for _ in range(num_shards)]
    return ShardedScheduler([Scheduler(own, pool, seq_ids=seq_ids) for pool in pools], [NUM_BLOCKS])


def answer(token_ids: list[int]) -> int:
    """What the made-up network says next."""
    return sum((i + 1) * token for i, token in enumerate(token_ids)) % 89


def test_each_device_gets_its_share() -> None:
    assert config_of_shard(CONFIG, 4) == EngineConfig(
        max_num_seqs=2, max_step_tokens=6, max_chunk_tokens=3, max_context_len=24, block_len=BLOCK_LEN,
        num_blocks=NUM_BLOCKS,
    )  # fmt: skip
    assert config_of_shard(CONFIG, 1) == CONFIG


def test_requests_go_where_least_is() -> None:
    scheduler = sharded()
    for i in range(7):
        scheduler.add(request(f"r{i}", (1, 2, 3), max_tokens=2))
    assert [one.num_waiting for one in scheduler._schedulers] == [3, 2, 2]
    with pytest.raises(RequestError, match="'r6' is in use"):
        scheduler.add(request("r6", (1,), max_tokens=2))
    assert scheduler.abort("r0") == 1
    assert (scheduler.num_waiting, scheduler.num_running, len(scheduler.request_ids)) == (6, 0, 6)
    plan = scheduler.schedule()
    assert plan is not None and sum(plan.rows_of_shards) == len(plan.rows)
    assert [scheduler.sequence(row.seq_id).seq_id for row in plan.rows] == [row.seq_id for row in plan.rows]
    with pytest.raises(KeyError):
        scheduler.sequence(99)


def test_copied_blocks_are_counted_through_all_devices() -> None:
    scheduler = sharded()
    scheduler.add(request("a", (1,) * 6, max_tokens=3))
    scheduler.add(request("b", (2,) * 6, max_tokens=3, n=2))  # on the second; its last block is copied
    copies: list[tuple[int, int, int]] = []
    while (plan := scheduler.schedule()) is not None:
        copies += plan.copies
        scheduler.commit(plan, [[7] if row.wants_token else [] for row in plan.rows])
    assert copies
    for group, source, destination in copies:
        assert group == 0
        assert NUM_BLOCKS < source < 2 * NUM_BLOCKS and NUM_BLOCKS < destination < 2 * NUM_BLOCKS


def simulate(scheduler: ShardedScheduler, caches: np.ndarray, plan: StepPlan) -> list[list[int]]:
    """Writes the rows' tokens into the devices' blocks as the packer places them, and answers from what lies there."""
    flat = caches.reshape(-1, BLOCK_LEN)
    for _, source, destination in plan.copies:
        flat[destination] = flat[source]
    outputs = []
    rows = iter(plan.rows)
    for shard, num_rows in enumerate(plan.rows_of_shards):
        for _ in range(num_rows):
            row = next(rows)
            (table,) = row.block_tables
            cache = caches[shard]
            for place, token in zip(range(row.start, row.start + row.count), row.token_ids, strict=True):
                cache[table[place // BLOCK_LEN], place % BLOCK_LEN] = token
            seen = [int(cache[table[i // BLOCK_LEN], i % BLOCK_LEN]) for i in range(row.start + row.count)]
            outputs.append([answer(seen)] if row.wants_token else [])
    return outputs


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_of_sequences_alone(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = sharded(rng.choice([2, 3]))
    caches = np.zeros((len(scheduler._schedulers), NUM_BLOCKS, BLOCK_LEN), np.int64)
    prompts: dict[str, tuple[int, ...]] = {}
    lengths: dict[str, int] = {}
    found: dict[tuple[str, int], list[int]] = {}
    stem = tuple(rng.randrange(80) for _ in range(8))
    while len(prompts) < 15 or scheduler.has_unfinished:
        if len(prompts) < 15 and rng.random() < 0.6:
            name = f"r{len(prompts)}"
            prompts[name] = stem[: rng.choice([0, 4, 8])] + tuple(rng.randrange(80) for _ in range(rng.randint(1, 7)))
            lengths[name] = rng.randint(1, 8)
            scheduler.add(
                request(name, prompts[name], max_tokens=lengths[name], n=rng.choice([1, 1, 2]), ignore_eos=True)
            )
        if rng.random() < 0.05:
            scheduler.schedule()
            scheduler.reset()
            caches[:] = 0
        plan = scheduler.schedule()
        if plan is not None:
            for event in scheduler.commit(plan, simulate(scheduler, caches, plan)):
                found.setdefault((event.request_id, event.index), []).extend(event.token_ids)
    for (name, _), tokens in found.items():
        expected = list(prompts[name])
        for _ in range(lengths[name]):
            expected.append(answer(expected))
        assert tokens == expected[len(prompts[name]) :]
    assert {name for name, _ in found} == prompts.keys()


@pytest.mark.parametrize("padding_is_free", [False, True])
def test_rows_lie_in_their_devices_part(padding_is_free: bool) -> None:
    scheduler = sharded(2)
    for name, length in (("a", 5), ("b", 2), ("c", 3)):
        scheduler.add(request(name, tuple(range(1, length + 1)), max_tokens=3))
    plan = scheduler.schedule()
    assert plan is not None and plan.rows_of_shards == (2, 1)
    packer = Packer(6, 6, BLOCK_LEN, 1, padding_is_free=padding_is_free, num_shards=2)
    shape, ints, _ = packer.pack(plan)
    fields = ints[: 6 * shape.num_rows].reshape(6, 2, -1)
    assert shape.num_rows % 2 == 0
    assert fields[0, 0, :8].tolist() == [1, 2, 3, 4, 5, 1, 2, 3] and fields[0, 1, :2].tolist() == [1, 2]
    assert fields[5, 0, :8].tolist() == [0] * 5 + [1] * 3 and fields[5, 1, :2].tolist() == [2, 2]
    tail = ints[6 * shape.num_rows :]
    assert tail[:5].tolist() == [shape.num_rows, 3, 4, 7, shape.num_rows // 2 + 1]
    tables = tail[2 + shape.num_seqs :].reshape(shape.num_seqs, shape.table_len)
    padding = fields[:, 1, 2:]
    assert set(padding[5]) == {shape.num_seqs - 1} and not tables[shape.num_seqs - 1].any()  # the null block
    assert (padding[[0, 1, 2, 3]] == 0).all() and (padding[4] == 1).all()
