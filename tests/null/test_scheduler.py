"""The scheduler against a model of the cache: every slot a row may see must hold exactly its own prefix."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import msgspec
import pytest

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.core.request import Request, SamplingParams, TokenEvent, TokenLogprob
from strop.engine.blocks import NULL_BLOCK, BlockPool
from strop.engine.scheduler import Scheduler
from strop.engine.sequence import Sequence, choice_seed
from strop.engine.step_plan import StepPlan
from strop.models.cache import num_live_blocks, num_pool_blocks

EOS = 0
VOCAB_SIZE = 40


def state_after(state: int, token_id: int, is_prompt: bool) -> int:
    """Stands for the keys and values of one token: depends on the whole prefix, and on how each token was computed."""
    return hash((state, token_id, is_prompt))


def sampled(state: int, seed: int, num_generated: int, params: SamplingParams) -> int:
    token_id = hash((state, 0 if params.greedy else seed)) % VOCAB_SIZE
    masked = num_generated < params.min_tokens and (token_id == EOS or token_id in params.stop_token_ids)
    return token_id + 7 if masked else token_id


def naive(
    prompt: tuple[int, ...], params: SamplingParams, seed: int, max_tokens: int, roles: bool
) -> tuple[list[int], str]:
    """What a choice must answer, computed alone from start to end."""
    state, generated = 0, list[int]()
    for token_id in prompt:
        state = state_after(state, token_id, True)
    while True:
        token_id = sampled(state, seed, len(generated), params)
        generated.append(token_id)
        is_stop = (token_id == EOS and not params.ignore_eos) or token_id in params.stop_token_ids
        if is_stop and len(generated) > params.min_tokens:
            return generated, "stop"
        if len(generated) == max_tokens:
            return generated, "length"
        state = state_after(state, token_id, not roles)


@dataclass
class ShadowEngine:
    """Runs plans on a cache whose slots hold prefix states, and checks all that a kernel would rely on."""

    config: EngineConfig
    num_blocks: int
    distinct_roles: bool = False
    window_lens: tuple[int | None, ...] = (None,)
    """One for each group of layers."""
    tight: bool = False
    """Whether windowed groups have just the blocks that one sequence needs."""
    num_steps: int = 0
    max_rows: int = 0
    num_copies: int = 0
    num_computed: int = 0
    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    events: list[TokenEvent] = field(default_factory=list)
    finished: dict[tuple[str, int], TokenEvent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pools = new_pools(self.config, self.num_blocks, self.window_lens, self.tight)
        self.scheduler = Scheduler(self.config, pools, {EOS}, distinct_roles=self.distinct_roles)
        self.lose_caches()

    def lose_caches(self) -> None:
        self.caches = [[[-1] * pool.block_len for _ in range(pool.num_blocks)] for pool in self.scheduler.groups.pools]

    @property
    def num_free(self) -> int:
        (pool,) = self.scheduler.groups.pools
        return pool.num_free

    @property
    def num_usable(self) -> int:
        (pool,) = self.scheduler.groups.pools
        return pool.num_usable

    def step(self, between: Callable[[StepPlan], None] | None = None) -> StepPlan | None:
        """Schedule, run, commit; `between` is called with the plan before the commit."""
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if plan is None:
            assert not self.scheduler.has_unfinished
            return None
        self.num_steps += 1
        self.max_rows = max(self.max_rows, len(plan.rows))
        outputs = self.run(plan)
        if between:
            between(plan)
            self.scheduler.check()
        events = self.scheduler.commit(plan, outputs)
        self.scheduler.check()
        self.events += events
        for event in events:
            key = event.request_id, event.index
            assert key not in self.finished
            self.answers.setdefault(key, []).extend(event.token_ids)
            if event.finish_reason:
                self.finished[key] = event
        return plan

    def run(self, plan: StepPlan) -> list[list[int]]:
        block_len = self.config.block_len
        assert 0 < plan.num_tokens == sum(row.count for row in plan.rows) <= self.config.max_step_tokens
        assert len(plan.rows) <= self.config.max_num_seqs
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        for group, cache in enumerate(self.caches):
            copies = [(src, dst) for g, src, dst in plan.copies if g == group]
            sources, destinations = {src for src, _ in copies}, [dst for _, dst in copies]
            assert not sources & set(destinations) and len(set(destinations)) == len(destinations)
            copied = {dst: list(cache[src]) for src, dst in copies}
            self.caches[group] = [copied.get(block, slots) for block, slots in enumerate(cache)]
            self.num_copies += len(copied)
        self.num_computed += plan.num_tokens

        sequences = [self.scheduler.sequence(row.seq_id) for row in plan.rows]
        prefixes = [self.prefix_states(seq) for seq in sequences]
        for row, seq, states in zip(plan.rows, sequences, prefixes, strict=True):
            end = row.start + row.count
            assert row.count >= 1 and row.token_ids == tuple(seq.token_ids[row.start : end])
            assert row.wants_token == (end == len(seq.token_ids)) and row.num_draft_tokens == 0
            assert row.num_prompt_tokens == sum(t < seq.prompt_len for t in range(row.start, end))
            assert min(map(len, row.block_tables)) * block_len >= row.num_slots >= end
            if self.distinct_roles:
                assert row.num_prompt_tokens in (0, row.count)
            for cache, table in zip(self.caches, row.block_tables, strict=True):
                for t in range(row.start, end):
                    assert table[t // block_len] != NULL_BLOCK
                    cache[table[t // block_len]][t % block_len] = states[t]
        for row, states in zip(plan.rows, prefixes, strict=True):  # after all writes: nobody overwrote a neighbour
            for cache, table, window_len in zip(self.caches, row.block_tables, self.window_lens, strict=True):
                lo = 0 if window_len is None else max(0, row.start + 1 - window_len)
                assert NULL_BLOCK not in table[lo // block_len :] and not any(table[: lo // block_len])
                for t in range(lo, row.start + row.count):
                    assert cache[table[t // block_len]][t % block_len] == states[t], (row, t)
        return [
            [sampled(states[-1], seq.seed, seq.num_generated_tokens, seq.params)] if row.wants_token else []
            for row, seq, states in zip(plan.rows, sequences, prefixes, strict=True)
        ]

    def prefix_states(self, seq: Sequence) -> list[int]:
        states, state = [], 0
        for t, token_id in enumerate(seq.token_ids):
            state = state_after(state, token_id, t < seq.prompt_len or not self.distinct_roles)
            states.append(state)
        return states

    def drain(self, max_steps: int) -> None:
        for _ in range(max_steps):
            if self.step() is None:
                break
        assert self.step() is None, f"unfinished after {max_steps} steps"
        assert all(pool.num_free == pool.num_usable for pool in self.scheduler.groups.pools)
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0

    def check_answer(self, request: Request, index: int, max_tokens: int | None = None) -> None:
        params = request.params
        assert params.seed is not None
        want, reason = naive(
            request.prompt_token_ids,
            params,
            choice_seed(params.seed, index),
            max_tokens or params.max_tokens or 0,
            self.distinct_roles,
        )
        key = request.request_id, index
        assert self.answers[key] == want
        assert self.finished[key].finish_reason == reason


def new_pools(
    config: EngineConfig, num_blocks: int, window_lens: tuple[int | None, ...] = (None,), tight: bool = False
) -> list[BlockPool]:
    pools = []
    for window_len in window_lens:
        most = num_pool_blocks(replace(config, num_blocks=num_blocks), window_len)
        if tight and window_len is not None:
            live = num_live_blocks(config.max_context_len, config.block_len, window_len, config.max_step_tokens)
            most = min(most, 1 + live)
        pools.append(BlockPool(most, config.block_len, config.prefix_cache, window_len))
    return pools


def engine(
    num_blocks: int = 65,
    distinct_roles: bool = False,
    window_lens: tuple[int | None, ...] = (None,),
    tight: bool = False,
    **config: Any,
) -> ShadowEngine:
    defaults = EngineConfig(max_num_seqs=8, max_step_tokens=64, max_context_len=256, block_len=4)
    return ShadowEngine(replace(defaults, **config), num_blocks, distinct_roles, window_lens, tight)


def request(name: str, prompt: range | tuple[int, ...], **params: Any) -> Request:
    sampling: dict[str, Any] = {"seed": 1, "ignore_eos": True} | params
    return Request(name, tuple(prompt), SamplingParams(**sampling))


@dataclass
class Workload:
    """A random engine, random arrivals and aborts; answers of whatever was not aborted must be the naive ones."""

    rng: random.Random
    window_lens: tuple[int | None, ...] = (None,)
    aborted: set[tuple[str, int]] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        block_len = rng.choice([1, 2, 4, 7])
        self.context_len = rng.randint(20, 60)
        num_blocks = rng.choice([1, 2, 6]) * -(-self.context_len // block_len) + 1
        self.engine = engine(
            num_blocks,
            distinct_roles=rng.random() < 0.3,
            window_lens=self.window_lens,
            tight=rng.random() < 0.5,
            block_len=block_len,
            max_num_seqs=rng.choice([1, 3, 8]),
            max_step_tokens=rng.choice([1, 3, 16, 200]),
            max_chunk_tokens=random.Random(self.context_len).choice([0, 0, 1, 4]),
            max_context_len=self.context_len,
            prefix_cache=rng.random() < 0.6,
        )
        self.stems = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(self.context_len)) for _ in range(3)]
        self.p_abort = rng.choice([0.0, 0.02, 0.2])
        self.p_reset = rng.choice([0.0, 0.0, 0.03])

    def arrive(self) -> None:
        rng = self.rng
        stem_len = rng.randrange(self.context_len - 2)
        tail = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 1, 5])))
        prompt = (rng.choice(self.stems)[:stem_len] + tail)[: self.context_len - 2] or (5,)
        max_tokens = rng.randint(1, self.context_len - len(prompt))
        new = request(
            f"r{len(self.requests)}",
            prompt,
            n=rng.choice([1, 1, 1, 2, 5]),
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, min(3, max_tokens)]),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(3),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([(), (3, 11)]),
        )
        self.engine.scheduler.add(new)
        self.requests.append(new)

    def maybe_abort(self, _: object = None) -> None:
        if self.requests and self.rng.random() < self.p_abort:
            victim = self.rng.choice(self.requests[-6:])
            index = self.rng.choice([None, *range(victim.params.n)])
            num_before = self.engine.scheduler.num_running + self.engine.scheduler.num_waiting
            num_aborted = self.engine.scheduler.abort(victim.request_id, index)
            assert num_before - num_aborted == self.engine.scheduler.num_running + self.engine.scheduler.num_waiting
            assert self.engine.scheduler.abort(victim.request_id, index) == 0
            indices = range(victim.params.n) if index is None else [index]
            self.aborted |= {(victim.request_id, i) for i in indices} - self.engine.finished.keys()

    def run(self, num_arrivals: int) -> None:
        while len(self.requests) < num_arrivals:
            for _ in range(self.rng.choice([0, 0, 1, 1, 3])):
                self.arrive()
            self.maybe_abort()
            self.engine.step(self.maybe_abort)
            if self.rng.random() < self.p_reset:
                self.engine.scheduler.schedule()
                self.engine.scheduler.reset()
                self.engine.lose_caches()
        num_tokens = sum((len(r.prompt_token_ids) + (r.params.max_tokens or 0)) * r.params.n for r in self.requests)
        self.engine.drain(max_steps=4 * num_tokens)
        for r in self.requests:
            for index in range(r.params.n):
                if (r.request_id, index) not in self.aborted:
                    self.engine.check_answer(r, index)
        assert not self.engine.finished.keys() & self.aborted


@pytest.mark.parametrize("seed", range(60))
def test_random_workloads_answer_as_if_alone(seed: int) -> None:
    Workload(random.Random(seed)).run(num_arrivals=25)


@pytest.mark.parametrize("window_lens", [(None,), (None, 9), (5,), (3, None, 14), (1, 30), (8, 9, 10)], ids=str)
def test_the_random_workloads_reach_the_hard_cases(window_lens: tuple[int | None, ...]) -> None:
    num_preemptions = num_hits = num_copies = num_aborted = 0
    for seed in range(12):
        workload = Workload(random.Random(seed), window_lens)
        workload.run(num_arrivals=25)
        num_preemptions += workload.engine.scheduler.num_preemptions
        num_hits += workload.engine.scheduler.num_prefix_hit_tokens
        num_copies += workload.engine.num_copies
        num_aborted += len(workload.aborted)
    assert min(num_hits, num_copies, num_aborted) > 20
    assert num_preemptions > (20 if None in window_lens else 5)  # windows do not grow, so admission foresees them


def test_chunked_prefill_keeps_the_budget_and_decodes_never_starve() -> None:
    eng = engine(max_step_tokens=8)
    eng.scheduler.add(request("short", (1, 2), max_tokens=30))
    eng.step()
    eng.scheduler.add(request("long", range(60), max_tokens=3))
    for chunk_len in [7] * 8 + [4]:
        plan = eng.step()
        assert plan is not None and [row.count for row in plan.rows] == [1, chunk_len]
    assert len(eng.answers["short", 0]) == 10 and len(eng.answers["long", 0]) == 1
    eng.drain(40)


def test_prompts_take_smaller_steps_while_answers_are_continued() -> None:
    eng = engine(max_step_tokens=40, max_chunk_tokens=6, prefix_cache=False)
    eng.scheduler.add(request("first", range(30), max_tokens=9))
    assert [row.count for row in planned(eng).rows] == [30]  # nobody waits
    eng.scheduler.add(request("second", range(9), max_tokens=9))
    eng.scheduler.add(request("third", range(5, 20), max_tokens=9))
    assert [row.count for row in planned(eng).rows] == [1, 6]
    assert [row.count for row in planned(eng).rows] == [1, 3, 3]
    assert [row.count for row in planned(eng).rows] == [1, 1, 6]
    eng.scheduler.abort("first")
    eng.scheduler.abort("second")
    assert [row.count for row in planned(eng).rows] == [6]
    eng.scheduler.add(request("whole", range(30), max_tokens=9), ((0, 30),))
    assert [row.count for row in planned(eng).rows] == [1, 30]  # cannot be divided
    eng.drain(20)


def planned(eng: ShadowEngine) -> StepPlan:
    plan = eng.step()
    assert plan is not None
    return plan


def test_running_sequences_never_outnumber_the_step_budget() -> None:
    eng = engine(max_num_seqs=8, max_step_tokens=3)
    for i in range(6):
        eng.scheduler.add(request(f"r{i}", (i, 1), max_tokens=8))
    eng.drain(80)
    assert eng.max_rows == 3


def test_a_fully_cached_prompt_recomputes_its_last_block_privately() -> None:
    eng = engine()
    eng.scheduler.add(request("a", range(16), max_tokens=1))
    eng.drain(5)
    eng.scheduler.add(request("b", range(16), max_tokens=1))
    plan = eng.step()
    assert plan is not None
    (row,) = plan.rows
    assert (row.start, row.count, row.wants_token) == (12, 4, True)
    assert eng.finished["b", 0].num_cached_tokens == 12 == eng.scheduler.num_prefix_hit_tokens
    assert eng.finished["a", 0].num_cached_tokens == 0
    assert eng.answers["a", 0] == eng.answers["b", 0]


def test_a_prefix_is_found_only_with_its_salt() -> None:
    eng = engine()
    for name, salt, num_cached in (("a", b"one", 0), ("b", b"two", 0), ("c", b"one", 12), ("d", b"", 0)):
        eng.scheduler.add(replace(request(name, range(16), max_tokens=1), cache_salt=salt))
        eng.drain(5)
        assert eng.finished[name, 0].num_cached_tokens == num_cached


def test_prefixes_are_shared_while_their_owner_runs() -> None:
    eng = engine()
    eng.scheduler.add(request("a", range(18), max_tokens=20))
    eng.step()
    num_free = eng.num_free
    eng.scheduler.add(request("b", (*range(16), 7, 7), max_tokens=2))
    eng.step()
    assert num_free - eng.num_free == 1
    eng.drain(30)


def test_a_preempted_sequence_hits_its_own_prefix_and_loses_nothing() -> None:
    eng = engine(num_blocks=12, max_context_len=40)  # 44 slots for two answers of 40
    requests = [request(name, range(i, i + 8), max_tokens=32) for i, name in enumerate("ab")]
    for r in requests:
        eng.scheduler.add(r)
    restarts = []
    while (plan := eng.step()) is not None:
        restarts += [row for row in plan.rows if row.seq_id == 1 and row.count > 1 and row.start > 0]
    assert eng.scheduler.num_preemptions >= 1 and restarts and eng.scheduler.num_prefix_hit_tokens > 0
    assert all(
        event.num_cached_tokens == 0 for event in eng.events
    )  # it recovered, but its user was not served from a cache
    for r in requests:
        eng.check_answer(r, 0)


def test_the_most_recently_admitted_is_preempted_and_returns_first() -> None:
    eng = engine(num_blocks=13, max_context_len=44, prefix_cache=False)
    for name in "abc":
        eng.scheduler.add(request(name, (1, 2, 3, 4), max_tokens=40))
    first_finished = []
    while eng.step() is not None:
        first_finished = list(eng.finished)
    assert first_finished == [("a", 0), ("b", 0), ("c", 0)] and eng.scheduler.num_preemptions > 0


def test_choices_share_the_prompt_and_compute_it_once() -> None:
    for prefix_cache in (True, False):
        for prompt_len in (1, 4, 13, 16, 17):
            eng = engine(prefix_cache=prefix_cache)
            r = request("r", range(prompt_len), n=4, max_tokens=6)
            eng.scheduler.add(r)
            eng.drain(30)
            assert eng.num_computed == prompt_len + 3 + 4 * 5  # each fork recomputes the prompt's last token
            assert eng.num_copies == (3 if (prompt_len - 1) % 4 else 0)
            for index in range(4):
                eng.check_answer(r, index)
            assert len({tuple(answer) for answer in eng.answers.values()}) == 4


def test_choices_fork_even_if_the_first_finishes_at_once() -> None:
    eng = engine(prefix_cache=False, max_num_seqs=2)
    eng.scheduler.add(request("r", range(30), n=5, max_tokens=1))
    eng.drain(10)
    assert eng.num_computed == 30 + 4 and len(eng.finished) == 5


def test_a_prompt_kept_for_forks_gives_way_when_space_is_short() -> None:
    eng = engine(num_blocks=7, max_context_len=24, prefix_cache=False, max_num_seqs=1)
    r = request("r", range(15), n=3, max_tokens=9)  # one choice needs all 6 blocks
    eng.scheduler.add(r)
    eng.drain(60)
    for index in range(3):
        eng.check_answer(r, index)


def test_aborting_the_leader_hands_the_prompt_to_another_choice() -> None:
    eng = engine(max_step_tokens=8, prefix_cache=False)
    r = request("r", range(30), n=3, max_tokens=4)
    eng.scheduler.add(r)
    eng.step()
    assert eng.scheduler.abort("r", 0) == 1
    eng.drain(30)
    assert sorted(eng.finished) == [("r", 1), ("r", 2)]
    for index in (1, 2):
        eng.check_answer(r, index)


@pytest.mark.parametrize(("num_steps", "order"), [(0, ["other", "r", "r"]), (1, ["r", "r", "other"])])
def test_the_heir_of_a_running_leader_goes_first_and_of_a_waiting_one_last(num_steps: int, order: list[str]) -> None:
    eng = engine(max_num_seqs=1, max_step_tokens=8)
    eng.scheduler.add(request("r", range(20), n=3, max_tokens=2))
    eng.scheduler.add(request("other", (1, 2), max_tokens=2))
    for _ in range(num_steps):
        eng.step()
    eng.scheduler.abort("r", 0)
    eng.drain(30)
    assert [name for name, _ in eng.finished] == order


def test_the_kept_prompt_goes_when_the_last_fork_has_started() -> None:
    eng = engine(prefix_cache=False)
    eng.scheduler.add(request("r", range(14), n=2, max_tokens=9, ignore_eos=False))
    for token_id, num_held in (
        (EOS, 4),
        (5, 4),
    ):  # the leader ends at once: its prompt stays, then only the fork's copy
        plan = eng.scheduler.schedule()
        assert plan is not None
        eng.scheduler.commit(plan, [[token_id]])
        assert eng.num_usable - eng.num_free == num_held
    eng.scheduler.check()


def test_admission_leaves_room_to_grow() -> None:
    eng = engine(num_blocks=7, max_context_len=24, prefix_cache=False)
    eng.scheduler.add(request("a", range(8), max_tokens=4))
    eng.scheduler.add(request("b", range(16), max_tokens=1))  # 4 blocks, and exactly 4 are free
    eng.drain(20)
    assert eng.scheduler.num_preemptions == 0 and eng.max_rows == 1


@pytest.mark.parametrize("num_steps", [0, 1, 2, 6])
def test_abort_at_any_stage_frees_everything_and_twice_is_harmless(num_steps: int) -> None:
    eng = engine(max_step_tokens=16, max_num_seqs=2)
    eng.scheduler.add(request("r", range(20), n=3, max_tokens=30))
    for _ in range(num_steps):
        eng.step()
    assert eng.scheduler.abort("r") == 3
    assert eng.scheduler.abort("r") == 0 == eng.scheduler.abort("never seen")
    assert eng.num_free == eng.num_usable
    assert eng.step() is None
    eng.scheduler.add(request("r", range(20), max_tokens=2))  # the name is free again
    eng.drain(10)


def test_a_commit_for_an_aborted_row_is_ignored() -> None:
    eng = engine()
    eng.scheduler.add(request("a", range(9), max_tokens=5))
    eng.scheduler.add(request("b", range(9), max_tokens=5))
    table: list[int] = []

    def abort(plan: StepPlan) -> None:
        table.extend(plan.rows[0].block_tables[0])
        eng.scheduler.abort("a")
        assert plan.rows[0].block_tables == [table]  # a step in flight still reads what it was given

    eng.step(abort)
    assert table and ("a", 0) not in eng.answers and len(eng.answers["b", 0]) == 1
    assert eng.scheduler.num_running == 1
    eng.drain(10)


def test_reset_recomputes_everything_and_loses_nothing() -> None:
    eng = engine(max_step_tokens=16)
    requests = [request(f"r{i}", range(i, i + 21), max_tokens=12, n=1 + i) for i in range(3)]
    for r in requests:
        eng.scheduler.add(r)
    for _ in range(5):
        eng.step()
    eng.scheduler.schedule()
    eng.scheduler.reset()
    eng.lose_caches()
    assert eng.scheduler.num_running == 0 and eng.num_free == eng.num_usable
    eng.drain(100)
    for r in requests:
        for index in range(r.params.n):
            eng.check_answer(r, index)


def test_a_step_is_committed_once_and_before_the_next() -> None:
    eng = engine()
    eng.scheduler.add(request("r", range(5), max_tokens=5))
    plan = eng.scheduler.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="plan in flight"):
        eng.scheduler.schedule()
    with pytest.raises(ValueError, match="0 outputs for 1 rows"):
        eng.scheduler.commit(plan, [])
    with pytest.raises(ValueError, match="wants_token=True, but 0 tokens"):
        eng.scheduler.commit(plan, [[]])
    with pytest.raises(ValueError, match="once"):
        eng.scheduler.commit(plan, [[1]])


def test_atomic_spans_are_never_split() -> None:
    eng = engine(max_step_tokens=10)
    eng.scheduler.add(request("busy", (1, 2, 3), max_tokens=25))
    eng.step()
    spans = ((2, 6), (7, 17), (17, 24))
    eng.scheduler.add(request("r", range(30), max_tokens=3, n=2), spans)
    eng.scheduler.add(request("later", range(30), max_tokens=3))
    eng.scheduler.add(request("again", range(30), max_tokens=3), spans)
    chunks: dict[int, list[tuple[int, int]]] = {}
    while (plan := eng.step()) is not None:
        for row in plan.rows:
            chunks.setdefault(row.seq_id, []).append((row.start, row.start + row.count))
    for seq_id in (1, 2, 4):
        for start, end in chunks[seq_id]:
            for lo, hi in spans:
                assert end <= lo or hi <= start or (start <= lo and hi <= end), (start, end)
    assert eng.scheduler.num_prefix_hit_tokens == 0 == eng.num_copies  # though all four prompts are the same
    assert len(eng.finished) == 5
    eng.scheduler.add(request("plain", range(30), max_tokens=3))
    eng.drain(10)
    assert eng.finished["plain", 0].num_cached_tokens == 28  # from "later"
    eng.scheduler.add(request("once more", range(30), max_tokens=3), spans)
    eng.drain(10)
    assert eng.finished["once more", 0].num_cached_tokens == 0


def test_blocks_of_an_atomic_span_are_not_published() -> None:
    eng = engine()
    eng.scheduler.add(request("spans", range(30), max_tokens=3), ((2, 6),))
    eng.drain(10)
    eng.scheduler.add(request("plain", range(30), max_tokens=3))
    eng.drain(10)
    assert eng.finished["plain", 0].num_cached_tokens == 0


def test_a_long_chunk_leaves_a_token_for_everyone_behind_it() -> None:
    eng = engine(max_step_tokens=10)
    eng.scheduler.add(request("long", range(40), max_tokens=2), ((4, 14),))
    eng.scheduler.add(request("later", (9, 9), max_tokens=5))
    rows = []
    while (plan := eng.step()) is not None:
        rows.append({row.seq_id: row.count for row in plan.rows})
    assert rows[0] == {0: 4, 1: 2}
    assert all(1 in row for row in rows[:5])


def test_an_atomic_span_gets_its_turn_under_endless_arrivals() -> None:
    eng = engine(max_step_tokens=8)
    eng.scheduler.add(request("first", (1,), max_tokens=9))
    eng.scheduler.add(request("r", range(12), max_tokens=2), ((2, 10),))
    for i in range(40):
        eng.scheduler.add(request(f"r{i}", (i, i), max_tokens=6))
        eng.step()
    assert ("r", 0) in eng.finished


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (((0, 20),), "20 tokens, but a step takes at most 16"),
        (((4, 4),), r"\[4, 4\)"),
        (((0, 5), (4, 8)), "start at 5 or later"),
        (((25, 31),), "prompt of 30 tokens"),
    ],
)
def test_impossible_spans_are_refused(spans: tuple[tuple[int, int], ...], message: str) -> None:
    eng = engine(max_step_tokens=16)
    with pytest.raises(RequestError, match=message):
        eng.scheduler.add(request("r", range(30)), spans)
    assert not eng.scheduler.has_unfinished


def test_what_can_never_fit_is_refused_with_figures() -> None:
    eng = engine(num_blocks=11, max_context_len=50)  # 40 slots, so 41 tokens
    add = eng.scheduler.add
    with pytest.raises(RequestError, match="empty"):
        add(request("r", ()))
    with pytest.raises(RequestError, match=r"prompt has 50 tokens, but the context is 50"):
        add(request("r", range(50), max_tokens=None))
    with pytest.raises(RequestError, match=r"\(20 tokens\) \+ answer \(31 tokens\) = 51 tokens, but the context is 50"):
        add(request("r", range(20), max_tokens=31))
    with pytest.raises(RequestError, match=r"= 42 tokens, but the whole cache holds 41 tokens \(10 blocks of 4\)"):
        add(request("r", range(20), max_tokens=22))
    with pytest.raises(RequestError, match="cache holds 41"):
        add(request("r", range(45), max_tokens=None))
    with pytest.raises(RequestError, match="min_tokens"):
        add(request("r", range(20), max_tokens=None, min_tokens=31))
    assert not eng.scheduler.has_unfinished
    add(request("r", range(20), max_tokens=21))
    with pytest.raises(RequestError, match="request_id='r' is in use"):
        add(request("r", range(20)))
    eng.drain(40)
    assert len(eng.answers["r", 0]) == 21


@pytest.mark.parametrize(("num_blocks", "want"), [(65, 30), (11, 21)])
def test_no_max_tokens_means_as_far_as_context_and_cache_reach(num_blocks: int, want: int) -> None:
    eng = engine(num_blocks=num_blocks, max_context_len=50)
    eng.scheduler.add(request("r", range(20), max_tokens=None))
    eng.drain(60)
    assert len(eng.answers["r", 0]) == want
    assert eng.finished["r", 0].finish_reason == "length"


def commit_tokens(params: SamplingParams, *steps: list[int]) -> TokenEvent:
    config = EngineConfig(max_context_len=64, block_len=4)
    scheduler = Scheduler(config, new_pools(config, 20), {EOS, 1})
    scheduler.add(Request("r", (5, 6, 7), params))
    for new_token_ids in steps:
        plan = scheduler.schedule()
        assert plan is not None
        logprobs = [TokenLogprob(token_id, -0.5) for token_id in new_token_ids]
        (event,) = scheduler.commit(plan, [new_token_ids], [logprobs])
        assert [logprob.token_id for logprob in event.logprobs] == list(event.token_ids)
    scheduler.check()
    assert scheduler.has_unfinished == (event.finish_reason is None)
    return event


@pytest.mark.parametrize(
    ("params", "steps", "token_ids", "finish_reason", "stop_reason"),
    [
        (SamplingParams(), [[9]], (9,), None, None),
        (SamplingParams(), [[9], [EOS]], (EOS,), "stop", None),
        (SamplingParams(), [[9], [1]], (1,), "stop", None),
        (SamplingParams(ignore_eos=True), [[EOS]], (EOS,), None, None),
        (SamplingParams(stop_token_ids=(8,)), [[8]], (8,), "stop", 8),
        (SamplingParams(stop_token_ids=(EOS,)), [[EOS]], (EOS,), "stop", None),
        (SamplingParams(stop_token_ids=(EOS,), ignore_eos=True), [[EOS]], (EOS,), "stop", EOS),
        (SamplingParams(max_tokens=2), [[9], [9]], (9,), "length", None),
        (SamplingParams(max_tokens=1), [[EOS]], (EOS,), "stop", None),
        (SamplingParams(min_tokens=1), [[EOS]], (EOS,), None, None),
        (SamplingParams(min_tokens=1), [[9], [EOS]], (EOS,), "stop", None),
        (SamplingParams(max_tokens=3), [[9, 9, 9, 9]], (9, 9, 9), "length", None),
        (SamplingParams(), [[9, EOS, 9]], (9, EOS), "stop", None),
        (SamplingParams(), [[9, 9, 9, 9, 9, 9], [9]], (9,), None, None),
    ],
)
def test_finishing(
    params: SamplingParams,
    steps: list[list[int]],
    token_ids: tuple[int, ...],
    finish_reason: str | None,
    stop_reason: int | None,
) -> None:
    event = commit_tokens(params, *steps)
    assert (event.token_ids, event.finish_reason, event.stop_reason) == (token_ids, finish_reason, stop_reason)


@pytest.mark.parametrize(
    ("params", "token_id", "is_complete", "finish_reason"),
    [
        (SamplingParams(), 9, True, "stop"),
        (SamplingParams(min_tokens=8, ignore_eos=True), 9, True, "stop"),
        (SamplingParams(max_tokens=1), 9, True, "stop"),
        (SamplingParams(), 9, False, None),
        (SamplingParams(ignore_eos=True), EOS, False, "stop"),
        (SamplingParams(min_tokens=2, ignore_eos=True), EOS, False, None),
    ],
)
def test_finishing_in_a_grammar(
    params: SamplingParams, token_id: int, is_complete: bool, finish_reason: str | None
) -> None:
    config = EngineConfig(max_context_len=64, block_len=4)
    scheduler = Scheduler(config, new_pools(config, 20), {EOS, 1})
    scheduler.add(Request("r", (5, 6, 7), params), grammar=cast(Any, object()))
    plan = scheduler.schedule()
    assert plan is not None
    complete = {plan.rows[0].seq_id} if is_complete else set()
    (event,) = scheduler.commit(plan, [[token_id]], complete=complete)
    assert (event.token_ids, event.finish_reason, event.stop_reason) == ((token_id,), finish_reason, None)
    scheduler.check()
    assert scheduler.has_unfinished == (finish_reason is None)


def test_seeds_differ_between_choices_and_repeat_between_requests() -> None:
    config = EngineConfig(max_context_len=64)
    scheduler = Scheduler(config, new_pools(config, 20))
    for name, seed, n in (("a", 7, 3), ("b", 7, 1), ("c", None, 1), ("d", None, 1), ("e", 0, 1), ("f", 0, 1)):
        scheduler.add(request(name, (1,), seed=seed, n=n))
    a0, a1, a2, b, c, d, e, f = (scheduler.sequence(seq_id).seed for seq_id in range(8))
    assert a0 == b and e == f and len({a0, a1, a2, c, d, e}) == 6
    assert all(0 <= seed < 2**64 for seed in (a0, a1, a2, c, d, e))


def test_roles_keep_prompt_and_answer_apart_in_the_prefix_cache() -> None:
    for distinct_roles in (False, True):
        eng = engine(distinct_roles=distinct_roles)
        eng.scheduler.add(request("a", range(8), max_tokens=9))
        eng.drain(20)
        eng.scheduler.add(request("b", (*range(8), *eng.answers["a", 0]), max_tokens=1))
        eng.drain(5)
        assert eng.finished["b", 0].num_cached_tokens == (8 if distinct_roles else 16)


def test_a_table_only_grows_while_its_version_stays() -> None:
    eng = engine(num_blocks=12, max_context_len=40)
    for name in "abc":
        eng.scheduler.add(request(name, range(8), max_tokens=32))
    seen: dict[tuple[int, int], list[int]] = {}
    while (plan := eng.step()) is not None:
        for row in plan.rows:
            before = seen.get((row.seq_id, row.table_version), [])
            assert row.block_tables[0][: len(before)] == before
            seen[row.seq_id, row.table_version] = list(row.block_tables[0])
    assert eng.scheduler.num_preemptions > 0


def test_a_plan_is_plain_data() -> None:
    eng = engine()
    eng.scheduler.add(request("r", range(9), n=2, max_tokens=3))
    eng.step()
    plan = eng.scheduler.schedule()
    assert plan is not None and plan.copies == () and len(plan.rows) == 2
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan
