"""Attention over the batch: each device of a mesh has the caches of sequences of its own, so each has a scheduler."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.core.request import Request, TokenEvent, TokenLogprob
from strop.engine.blocks import BlockPool
from strop.engine.scheduler import Scheduler
from strop.engine.sequence import Sequence as Seq
from strop.engine.step_plan import StepPlan

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar import Grammar


def config_of_shard(config: EngineConfig, num_shards: int) -> EngineConfig:
    """Each device's even share of the sequences and of a step's tokens."""
    return replace(
        config,
        max_num_seqs=-(-config.max_num_seqs // num_shards),
        max_step_tokens=-(-config.max_step_tokens // num_shards),
        max_chunk_tokens=-(-config.max_chunk_tokens // num_shards),
    )


class ShardedScheduler:
    """Schedulers whose plans make up one step. A request stays, with all its choices, where least was when it came.

    `num_blocks` are those of each group's cache on a device; copied blocks are counted through all devices.
    """

    def __init__(self, schedulers: Sequence[Scheduler], num_blocks: Sequence[int]) -> None:
        """The schedulers have the same settings, and number their sequences together."""
        self._schedulers, self._num_blocks = schedulers, num_blocks
        self._plans: list[StepPlan | None] = []
        self._joined: StepPlan | None = None

    @property
    def pools(self) -> list[BlockPool]:
        """Of all groups of all devices."""
        return [pool for one in self._schedulers for pool in one.pools]

    @property
    def num_running(self) -> int:
        """See Scheduler."""
        return sum(one.num_running for one in self._schedulers)

    @property
    def num_waiting(self) -> int:
        """See Scheduler."""
        return sum(one.num_waiting for one in self._schedulers)

    @property
    def num_preemptions(self) -> int:
        """See Scheduler."""
        return sum(one.num_preemptions for one in self._schedulers)

    @property
    def num_prefix_query_tokens(self) -> int:
        """See Scheduler."""
        return sum(one.num_prefix_query_tokens for one in self._schedulers)

    @property
    def num_prefix_hit_tokens(self) -> int:
        """See Scheduler."""
        return sum(one.num_prefix_hit_tokens for one in self._schedulers)

    @property
    def has_unfinished(self) -> bool:
        """See Scheduler."""
        return any(one.has_unfinished for one in self._schedulers)

    @property
    def request_ids(self) -> list[str]:
        """See Scheduler."""
        return [request_id for one in self._schedulers for request_id in one.request_ids]

    @property
    def max_request_tokens(self) -> int:
        """See Scheduler."""
        return self._schedulers[0].max_request_tokens

    @property
    def max_cached_tokens(self) -> int:
        """See Scheduler."""
        return self._schedulers[0].max_cached_tokens

    def sequence(self, seq_id: int) -> Seq:
        """See Scheduler."""
        for one in self._schedulers:
            try:
                return one.sequence(seq_id)
            except KeyError:
                pass
        raise KeyError(seq_id)

    def add(self, request: Request, *, grammar: "Grammar | None" = None) -> None:
        """See Scheduler."""
        if request.request_id in self.request_ids:
            raise RequestError(f"request_id={request.request_id!r} is in use: give every unfinished request its own")
        least = min(self._schedulers, key=lambda one: one.num_running + one.num_waiting)
        least.add(request, grammar=grammar)

    def abort(self, request_id: str, index: int | None = None) -> int:
        """See Scheduler."""
        return sum(one.abort(request_id, index) for one in self._schedulers)

    def schedule(self) -> StepPlan | None:
        """The next step of all devices, or None if nothing is unfinished."""
        plans = self._plans = [one.schedule() for one in self._schedulers]
        if not any(plans):
            return None
        self._joined = StepPlan(
            rows=tuple(chain.from_iterable(plan.rows for plan in plans if plan)),
            copies=tuple(
                (group, source + shard * self._num_blocks[group], destination + shard * self._num_blocks[group])
                for shard, plan in enumerate(plans)
                if plan
                for group, source, destination in plan.copies
            ),
            num_tokens=sum(plan.num_tokens for plan in plans if plan),
            rows_of_shards=tuple(len(plan.rows) if plan else 0 for plan in plans),
        )
        return self._joined

    def commit(
        self,
        plan: StepPlan,
        outputs: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
        scores: Sequence[Sequence[TokenLogprob]] | None = None,
        complete: Collection[int] = (),
    ) -> list[TokenEvent]:
        """See Scheduler."""
        if plan is not self._joined:
            raise ValueError("commit() takes the plan that schedule() gave last, once")
        self._joined = None
        events = []
        ends = list(accumulate(plan.rows_of_shards))
        for one, own, end in zip(self._schedulers, self._plans, ends, strict=True):
            if own is not None:
                rows = slice(end - len(own.rows), end)
                of_tokens, of_prompts = (None if part is None else part[rows] for part in (logprobs, scores))
                events += one.commit(own, outputs[rows], of_tokens, of_prompts, complete)
        return events

    def reset(self) -> None:
        """See Scheduler."""
        self._joined = None
        for one in self._schedulers:
            one.reset()
