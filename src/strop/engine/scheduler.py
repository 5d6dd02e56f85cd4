"""Which tokens the next step computes. No phases: every sequence catches up from its computed to its known tokens.

Prefill, chunked prefill, decode, prefix hits, forks and recovery from preemption are all that one case. `schedule`
reserves; `commit` is the only place where token counts advance, blocks are published and sequences finish.
"""

import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import count
from typing import TYPE_CHECKING

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.core.request import FinishReason, Request, TokenEvent, TokenLogprob
from strop.engine.blocks import BlockPool, block_key
from strop.engine.group_pools import GroupPools, Tables
from strop.engine.request_check import answer_room, check_spans
from strop.engine.sequence import Choices, Sequence, State, choice_seed
from strop.engine.step_plan import StepPlan, StepRow, step_row

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar import Grammar


class Scheduler:
    """Serves running sequences first, oldest first, then admits waiting ones in order of arrival.

    A sequence needs blocks in every group of layers, so one table and one pool per group; a prefix is found if every
    group still has what it sees of it. Blocks for all known tokens (in a windowed group, as many of them as a step can
    see) are taken on admission, so that mostly a growing answer can run out of them. Then the most recently admitted
    sequence gives its blocks back and waits at the front of the queue; it keeps its tokens and recomputes their cache
    later (or finds it again in the prefix cache).

    While answers are continued, a step takes `max_chunk_tokens` of prompts at most, since each token of an answer takes
    as long as the whole step.

    A hit never covers a sequence's last token, whose logits are needed: a fully cached prompt recomputes its last block
    into a private one. Forks share the prompt's full blocks, copy a partial one, and recompute the last prompt token.

    `config.max_context_len` must be resolved (not 0); `pools`, one for each group of layers, are of `config.block_len`
    and used by nobody else. With `distinct_roles`, no row mixes prompt and generated tokens and the prefix cache keeps
    the two apart: for kernels that differ between them. One thread calls all methods.
    """

    def __init__(
        self,
        config: EngineConfig,
        pools: SequenceOf[BlockPool],
        eos_token_ids: Collection[int] = (),
        *,
        distinct_roles: bool = False,
        seq_ids: Iterator[int] | None = None,
    ) -> None:
        for name in ("max_context_len", "max_num_seqs", "max_step_tokens"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)}: the scheduler needs the resolved value, 1 or more")
        self.groups = GroupPools(pools, config.max_step_tokens)
        self.num_preemptions = 0
        self.num_prefix_query_tokens = self.num_prefix_hit_tokens = 0
        self._max_context_len = config.max_context_len
        self._max_step_tokens = config.max_step_tokens
        self._max_chunk_tokens = config.max_chunk_tokens or config.max_step_tokens
        self._max_num_seqs = config.max_num_seqs
        self._block_len = config.block_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._distinct_roles = distinct_roles
        self._seq_ids = seq_ids or count()
        self._requests: dict[str, Choices] = {}
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}  # in order of admission
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._holding: dict[str, Choices] = {}  # those with held_tables
        self._in_flight: StepPlan | None = None

    @property
    def pools(self) -> list[BlockPool]:
        """Of all groups of layers."""
        return list(self.groups.pools)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Unfinished sequences that hold no blocks: queued, preempted, or waiting for their prompt to be computed."""
        return len(self._sequences) - len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence still wants tokens."""
        return bool(self._sequences)

    @property
    def request_ids(self) -> list[str]:
        """Of all unfinished requests."""
        return list(self._requests)

    @property
    def max_request_tokens(self) -> int:
        """Prompt and answer of a request, at most: what the context and the whole cache hold."""
        return min(self._max_context_len, self.max_cached_tokens + 1)  # the last token is never computed

    @property
    def max_cached_tokens(self) -> int:
        """Tokens of one sequence that the whole cache holds, as far as the context goes."""
        return self.groups.max_tokens(self._max_context_len)

    def sequence(self, seq_id: int) -> Sequence:
        """The unfinished sequence with this id; KeyError if it finished or was aborted."""
        return self._sequences[seq_id]

    def add(
        self, request: Request, atomic_spans: tuple[tuple[int, int], ...] = (), grammar: "Grammar | None" = None
    ) -> None:
        """Queue all n choices of a request. RequestError, and no change, if it can never be served as asked.

        `grammar` is kept for the sampler, whose caller tells `commit` which answers are complete.

        `atomic_spans`, if any, are half-open ranges of the prompt that must each be computed in one step; then nothing
        is shared, neither with other requests nor between the choices.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is in use: give every unfinished request its own")
        max_tokens = answer_room(request, self._max_context_len, self.max_cached_tokens, self._block_len)
        check_spans(len(request.prompt_token_ids), atomic_spans, self._max_step_tokens)
        params = request.params
        request_seed = secrets.randbits(64) if params.seed is None else params.seed
        choices = self._requests[request.request_id] = Choices(request, grammar=grammar)
        finish_token_ids = frozenset(params.stop_token_ids)
        if choices.heeds_eos:
            finish_token_ids |= self._eos_token_ids
        for index in range(params.n):
            seq = Sequence(
                seq_id=next(self._seq_ids),
                choices=choices,
                index=index,
                seed=choice_seed(request_seed, index),
                max_tokens=max_tokens,
                finish_token_ids=finish_token_ids,
                token_ids=list(request.prompt_token_ids),
                prompt_len=len(request.prompt_token_ids),
                block_tables=self.groups.new_tables(),
                atomic_spans=atomic_spans,
            )
            self._sequences[seq.seq_id] = choices.live[index] = seq
            if index == 0:
                self._waiting[seq.seq_id] = seq
            else:
                choices.unforked[seq.seq_id] = seq
                choices.leader = choices.live[0]

    def abort(self, request_id: str, index: int | None = None) -> int:
        """Drop one choice, or all, at any stage; returns how many there were to drop (0: unknown or finished).

        Blocks are free at once. A step in flight may still write them, before any later step that reuses them runs.
        """
        choices = self._requests.get(request_id)
        if choices is None:
            return 0
        doomed = [seq for seq in choices.live.values() if index is None or seq.index == index]
        for seq in doomed:
            self._remove(seq)
        return len(doomed)

    def schedule(self) -> StepPlan | None:
        """The next step's work, or None if nothing is unfinished. Commit it (or `reset`) before scheduling again."""
        if self._in_flight is not None:
            raise ValueError("schedule() was called with a plan in flight: commit it, or reset() if its step failed")
        rows: list[StepRow] = []
        copies: list[tuple[int, int, int]] = []
        budget, num_scores = self._max_step_tokens, self._max_num_seqs
        running = list(self._running.values())
        num_behind = len(running)
        chunk = self._max_chunk_tokens if any(seq.continues_answer for seq in running) else budget
        may_admit = True

        def compute(seq: Sequence, end: int) -> None:
            nonlocal budget, chunk, num_scores
            row = step_row(seq, seq.num_computed_tokens, end)
            rows.append(row)
            budget -= row.count
            num_scores -= len(row.scored_token_ids)
            if not seq.continues_answer:
                chunk = max(0, chunk - row.count)

        for seq in running:
            if seq.state is not State.RUNNING:  # preempted just now, and so are all after it
                may_admit = False
                break
            num_behind -= 1
            end = self._chunk_end(seq, seq.num_computed_tokens, budget - num_behind, chunk, num_scores)
            if end == seq.num_computed_tokens:  # this step has no room for its prompt
                may_admit = False
                continue
            if end > seq.num_slots and not self._grow(seq, end):
                may_admit = False
                break
            compute(seq, end)
        while may_admit and budget and self._waiting and len(self._running) < self._max_num_seqs:
            seq = next(iter(self._waiting.values()))
            if not self._admit(seq, budget, chunk, num_scores, copies):
                break
            compute(seq, self._chunk_end(seq, seq.num_computed_tokens, budget, chunk, num_scores))
        for choices in list(self._holding.values()):  # only now, so that no copy's source is handed out in this plan
            if not choices.unforked:
                self._drop_hold(choices)
        if rows:
            self._in_flight = StepPlan(tuple(rows), tuple(copies), self._max_step_tokens - budget)
        return self._in_flight

    def commit(
        self,
        plan: StepPlan,
        outputs: SequenceOf[SequenceOf[int]],
        logprobs: SequenceOf[SequenceOf[TokenLogprob]] | None = None,
        scores: SequenceOf[SequenceOf[TokenLogprob]] | None = None,
        complete: Collection[int] = (),
    ) -> list[TokenEvent]:
        """Take a step's results: `outputs[i]` are the new tokens of `plan.rows[i]`, empty unless it wants a token.

        Answers of the seq_ids in `complete` have all that their grammar allows: they end with their new tokens.

        Tokens after the one that ends a sequence are dropped; rows of sequences aborted meanwhile are ignored. Returns
        one event per choice that got tokens; `logprobs[i]`, where given, runs parallel to `outputs[i]`, and `scores[i]`
        to the row's `scored_token_ids`.
        """
        if plan is not self._in_flight:
            raise ValueError("commit() takes the plan that schedule() gave last, once")
        if len(outputs) != len(plan.rows):
            raise ValueError(f"{len(outputs)} outputs for {len(plan.rows)} rows")
        self._in_flight = None
        events = []
        for i, row in enumerate(plan.rows):
            seq = self._sequences.get(row.seq_id)
            if seq is None:
                continue
            new_token_ids = outputs[i]
            if bool(new_token_ids) != row.wants_token:
                raise ValueError(f"row {i}: wants_token={row.wants_token}, but {len(new_token_ids)} tokens came")
            seq.num_computed_tokens = row.start + row.count
            if scores and row.scored_token_ids:
                seq.prompt_logprobs[row.start :] = scores[i]
            if seq.num_computed_tokens >= (seq.num_published_blocks + 1) * self._block_len:
                self._publish(seq)
            if seq.choices.leader is seq and seq.num_computed_tokens >= seq.prompt_len:
                self._release_forks(seq)
            self.groups.slide(seq.block_tables, row.start, seq.num_computed_tokens)
            if row.wants_token:
                is_complete = row.seq_id in complete
                events.append(self._extend(seq, new_token_ids, logprobs[i] if logprobs else (), is_complete))
        return events

    def reset(self) -> None:
        """The cache's contents are lost (a step failed): every sequence starts over with the tokens it has."""
        self._in_flight = None
        self._drop_holds()
        for seq in reversed(list(self._running.values())):
            self._preempt(seq)
            seq.sample_row = None  # it may have taken note of a token that was never committed
        self.groups.forget()

    def check(self) -> None:
        """Raise ValueError unless block counts, tables and states agree. For tests: O(num_blocks)."""
        for seq in self._sequences.values():
            if seq.state is State.WAITING and (any(seq.block_tables) or seq.num_computed_tokens):
                raise ValueError(f"sequence {seq.seq_id} waits, but has something in the cache")
            if seq.num_slots > min(map(len, seq.block_tables), default=0) * self._block_len:
                raise ValueError(f"sequence {seq.seq_id} has no room for {seq.num_slots} tokens")
        running = [(seq.block_tables, seq.num_computed_tokens) for seq in self._running.values()]
        self.groups.check(running, [choices.held_tables for choices in self._holding.values()])

    def _chunk_end(self, seq: Sequence, start: int, budget: int, chunk: int, num_scores: int) -> int:
        """Where the step's share from `start` ends: of at most `budget` tokens, `chunk` of a divisible prompt,
        `num_scores` with log probabilities of the prompt. `start` if there is room for none."""
        if not (seq.continues_answer or seq.atomic_spans):
            budget = min(budget, chunk)
        end = min(len(seq.token_ids), start + budget)
        if seq.wants_scores and start + num_scores < seq.prompt_len - 1:
            end = min(end, start + num_scores)
        if self._distinct_roles and start < seq.prompt_len < end:
            end = seq.prompt_len
        for lo, hi in seq.atomic_spans:
            if lo < end < hi:
                return lo
        return end

    def _grow(self, seq: Sequence, end: int) -> bool:
        """Extend a running sequence's tables to `end` tokens, preempting others; False if it had to go itself."""
        num_blocks = -(-end // self._block_len)
        lengths = [max(num_blocks, len(table)) for table in seq.block_tables]
        while not self.groups.fits(seq.block_tables, lengths, [0] * len(lengths)):
            if self._holding:
                self._drop_holds()
                continue
            victim = self._running[next(reversed(self._running))]
            self._preempt(victim)
            if victim is seq:
                return False
        self.groups.extend(seq.block_tables, lengths)
        seq.num_slots = num_blocks * self._block_len
        return True

    def _admit(
        self, seq: Sequence, budget: int, chunk: int, num_scores: int, copies: list[tuple[int, int, int]]
    ) -> bool:
        """Start the sequence at the head of the queue if its blocks and its first chunk fit."""
        tables, num_computed_tokens, copy_sources, is_fork = self._find_prefix(seq)
        if self._chunk_end(seq, num_computed_tokens, budget, chunk, num_scores) == num_computed_tokens:
            return False
        num_shared = len(tables[0])
        lengths = self.groups.lengths(len(seq.token_ids), num_computed_tokens)
        if not self.groups.fits(tables, lengths, self._num_spare()):
            if self._running or not self._holding:
                return False
            self._drop_holds()  # nothing runs, so nothing else will give way
            return self._admit(seq, budget, chunk, num_scores, copies)
        self.groups.share(tables)
        self.groups.extend(tables, lengths)
        seq.block_tables = tables
        seq.num_slots = min(lengths) * self._block_len
        seq.num_published_blocks = num_shared
        seq.num_computed_tokens = num_computed_tokens
        seq.state = State.RUNNING
        self._running[seq.seq_id] = self._waiting.pop(seq.seq_id)
        choices = seq.choices
        copies += [(group, source, tables[group][num_shared]) for group, source in enumerate(copy_sources)]
        if not is_fork and self.groups.prefix_cache:
            self.num_prefix_query_tokens += len(seq.token_ids)
            self.num_prefix_hit_tokens += num_computed_tokens
        if choices.num_cached_tokens is None:
            choices.num_cached_tokens = num_computed_tokens
        choices.unforked.pop(seq.seq_id, None)
        return True

    def _num_spare(self) -> list[int]:
        """Blocks that an admission leaves free, lest it preempts at once: one for each sequence that may grow."""
        num_spare = [0] * len(self.groups.pools)
        for seq in self._running.values():
            total = seq.prompt_len + seq.max_tokens - 1
            may_grow = self.groups.may_grow(seq.block_tables, seq.num_computed_tokens, total)
            num_spare = [spare + may for spare, may in zip(num_spare, may_grow, strict=True)]
        return num_spare

    def _find_prefix(self, seq: Sequence) -> tuple[Tables, int, list[int], bool]:
        """Blocks to share in each group, tokens that need no computing, the blocks to copy into the first private ones,
        and whether it all comes from the request's own prompt (a fork) rather than from the prefix cache."""
        nothing = self.groups.new_tables()
        if seq.atomic_spans:  # keys and values inside a span depend on tokens after them: a prefix does not name them
            return nothing, 0, [], False
        num_matchable = 0 if seq.wants_scores else (len(seq.token_ids) - 1) // self._block_len
        cached = self.groups.match(self._keys(seq, num_matchable)) if self.groups.prefix_cache else nothing
        num_cached_tokens = len(cached[0]) * self._block_len
        held, fork_len = seq.choices.held_tables, seq.prompt_len - 1
        if held and num_cached_tokens < fork_len:
            num_full, partial_len = divmod(fork_len, self._block_len)
            partial = [table[num_full] for table in held] if partial_len else []
            return [table[:num_full] for table in held], fork_len, partial, True
        return cached, num_cached_tokens, [], False

    def _keys(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Keys of the sequence's first `num_blocks` blocks, which must be full."""
        keys = seq.block_keys
        block_len = self._block_len
        for i in range(len(keys), num_blocks):
            begin = i * block_len
            num_prompt_tokens = min(max(seq.prompt_len - begin, 0), block_len) if self._distinct_roles else block_len
            parent = keys[-1] if keys else seq.request.cache_salt
            keys.append(block_key(parent, seq.token_ids[begin : begin + block_len], num_prompt_tokens))
        return keys if len(keys) == num_blocks else keys[:num_blocks]

    def _publish(self, seq: Sequence) -> None:
        """Let others find the blocks that have become full."""
        num_full = seq.num_computed_tokens // self._block_len
        if self.groups.prefix_cache and not seq.atomic_spans:
            keys = self._keys(seq, num_full)
            for i in range(seq.num_published_blocks, num_full):
                self.groups.publish(seq.block_tables, i, keys[i])
        seq.num_published_blocks = num_full

    def _release_forks(self, leader: Sequence) -> None:
        """The prompt is computed: keep its blocks for the other choices and put those at the front of the queue."""
        choices = leader.choices
        choices.leader = None
        if not choices.unforked:
            return
        choices.held_tables = self.groups.prefix(leader.block_tables, leader.prompt_len - 1)
        self.groups.share(choices.held_tables)
        self._holding[choices.request.request_id] = choices
        for seq in reversed(choices.unforked.values()):
            self._enqueue_first(seq)

    def _extend(
        self, seq: Sequence, new_token_ids: SequenceOf[int], logprobs: SequenceOf[TokenLogprob], is_complete: bool
    ) -> TokenEvent:
        """Append tokens until one ends the sequence, as the last does if the answer is complete."""
        finish_reason: FinishReason | None = None
        stop_reason: int | None = None
        params = seq.params
        num_before = len(seq.token_ids)
        for token_id in new_token_ids:
            seq.token_ids.append(token_id)
            num_generated = len(seq.token_ids) - seq.prompt_len
            if token_id in seq.finish_token_ids and num_generated > params.min_tokens:
                finish_reason = "stop"
                stop_reason = None if token_id in self._eos_token_ids and seq.choices.heeds_eos else token_id
                break
            if num_generated >= seq.max_tokens:
                finish_reason = "length"
                break
        if is_complete:
            finish_reason = "stop"
        kept = tuple(seq.token_ids[num_before:])
        prompt_logprobs, seq.prompt_logprobs = tuple(seq.prompt_logprobs), []
        if finish_reason:
            self._remove(seq)
        return TokenEvent(
            seq.choices.request.request_id,
            seq.index,
            kept,
            tuple(logprobs[: len(kept)]),
            finish_reason,
            stop_reason,
            seq.choices.num_cached_tokens or 0,
            prompt_logprobs,
        )

    def _preempt(self, seq: Sequence) -> None:
        """Back to the front of the queue, without blocks but with every token."""
        self.num_preemptions += 1
        del self._running[seq.seq_id]
        self._release_blocks(seq)
        seq.state = State.WAITING
        seq.num_computed_tokens = 0
        seq.num_published_blocks = 0
        self._enqueue_first(seq)

    def _remove(self, seq: Sequence) -> None:
        """Finished or aborted: forget the sequence. If others waited for it to compute the prompt, one takes over."""
        was_running = seq.state is State.RUNNING
        seq.state = State.FINISHED
        self._release_blocks(seq)
        self._running.pop(seq.seq_id, None)
        self._waiting.pop(seq.seq_id, None)
        del self._sequences[seq.seq_id]
        choices = seq.choices
        del choices.live[seq.index]
        choices.unforked.pop(seq.seq_id, None)
        if choices.leader is seq:
            choices.leader = None
            if choices.unforked:
                heir = choices.unforked.pop(next(iter(choices.unforked)))
                choices.leader = heir
                self._waiting[heir.seq_id] = heir
                self._waiting.move_to_end(heir.seq_id, last=not was_running)
        if not choices.unforked:
            self._drop_hold(choices)
        if not choices.live:
            del self._requests[choices.request.request_id]

    def _release_blocks(self, seq: Sequence) -> None:
        self.groups.release(seq.block_tables)
        seq.block_tables = self.groups.new_tables()  # a plan in flight may still read the old ones
        seq.num_slots = 0
        seq.table_version += 1

    def _enqueue_first(self, seq: Sequence) -> None:
        self._waiting[seq.seq_id] = seq
        self._waiting.move_to_end(seq.seq_id, last=False)

    def _drop_hold(self, choices: Choices) -> None:
        if self._holding.pop(choices.request.request_id, None):
            self.groups.release(choices.held_tables)
            choices.held_tables = []

    def _drop_holds(self) -> None:
        """Give up prompts kept for forks: those that have not started will compute the prompt again."""
        for choices in list(self._holding.values()):
            self._drop_hold(choices)
