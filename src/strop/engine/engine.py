"""One model on one device: add requests, step, read events. Not thread-safe: one thread calls everything."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, StropError
from strop.core.request import Request, TokenEvent, TokenLogprob
from strop.engine.blocks import BlockPool
from strop.engine.lead import compiled_model
from strop.engine.loading import LoadedModel, load_model
from strop.engine.pack import Packer, StepShape, Wanted, bucket
from strop.engine.sample import SampleRow, build_sample_inputs, needs_full, scoring_row
from strop.engine.scheduler import Scheduler
from strop.engine.shards import ShardedScheduler, config_of_shard
from strop.engine.step_plan import StepPlan, StepRow
from strop.formats.tokenizer import Tokenizer
from strop.models.cache import cache_groups, num_pool_blocks
from strop.models.layout import Single
from strop.models.memory import MemoryPlan
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.spec import ModelSpec
from strop.ops.sample import ALL_ALLOWED

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar import Grammars

log = logging.getLogger(__name__)

Logprobs = list[list[TokenLogprob]]
"""By row of the plan."""

_UNKNOWN_LOGPROB = -9999.0
"""Of a token that took the place of a sampled one: what OpenAI's API gives for very unlikely ones."""
_MAX_FAILURES = 3  # steps that may fail in a row before the engine gives up


@dataclass(slots=True)
class StepTimes:
    """Where the last step's time went, and on what."""

    schedule_s: float = 0.0
    pack_s: float = 0.0
    run_s: float = 0.0
    commit_s: float = 0.0
    num_tokens: int = 0
    rows: tuple[StepRow, ...] = ()
    """What it computed; nothing if it failed."""


class Engine:
    """The continuous batch: every `step` serves all running sequences and admits waiting ones."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.spec: ModelSpec = model.spec
        self.params: Parameters = model.params
        self.tokenizer: Tokenizer = model.tokenizer
        self.memory: MemoryPlan = model.memory
        self.config = config
        self.layout = model.layout or Single(model.platform, config.block_len, config.kv_dtype)
        self._compiled = compiled_model(model, self.layout, config)
        self._groups = cache_groups(model.spec)
        over_batch = isinstance(self.layout, Partition) and self.layout.attention == "batch"
        self._num_shards = self.layout.mesh.size() if over_batch else 1  # type: ignore[union-attr]
        of_shard = config_of_shard(config, self._num_shards)
        self._num_blocks = [num_pool_blocks(of_shard, group.window_len) for group in self._groups]
        self.scheduler = self._new_scheduler(of_shard)
        self.last_step = StepTimes()
        self._table_len = -(-config.max_context_len // config.block_len)
        self._packer = self._new_packer()
        self._caches = self._compiled.new_caches(self._num_blocks)
        self._num_failures = 0

    @classmethod
    def load(cls, model: str, config: EngineConfig | None = None) -> "Engine":
        """An engine for a GGUF file, a Hugging Face folder, an artifact or a Hub id; refuses what does not fit."""
        loaded, resolved = load_model(model, config or EngineConfig())
        return cls(loaded, resolved)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return self.scheduler.has_unfinished

    def add(self, request: Request) -> None:
        """Queues a request. RequestError, and no change, when it can never be served as asked.

        Structured output is compiled here, however long that takes: a GrammarChecker tells first whether it can be.
        """
        params = request.params
        self._check_ids("prompt", request.prompt_token_ids)
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("stop_token_ids", params.stop_token_ids)
        wanted = params.structured_outputs
        self.scheduler.add(request, grammar=None if wanted is None else self._grammars.compile(wanted))

    def prepare_structured_outputs(self) -> None:
        """Does now what the first request for structured output would have to wait for."""
        self._grammars.prepare()

    def abort(self, request_id: str, index: int | None = None) -> int:
        """Drops a request, or one of its choices; its blocks are free at once. Returns how many were dropped."""
        return self.scheduler.abort(request_id, index)

    def step(self) -> list[TokenEvent]:
        """Runs one step; returns what it produced. Empty when nothing is waiting.

        A step that fails loses nothing: all sequences start over from their tokens with a fresh cache.

        Raises:
            StropError: a step was refused, or several failed in a row. The requests are still there: abort them.
        """
        begin = time.perf_counter()
        self.last_step.rows = ()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        scheduled = time.perf_counter()
        try:
            self._copy_blocks(plan)
            shape, ints, wanted = self._packer.pack(plan)
            rows = [self._sample_row(plan, want) for want in wanted]
            packed = time.perf_counter()
            outputs, logprobs, scores = self._run(plan, shape, ints, wanted, rows)
            ran = time.perf_counter()
            complete = self._advance_matchers(plan, wanted, rows, outputs, logprobs)
        except Exception as error:
            self._recover(error)
            return []
        except BaseException:  # an interrupt, say: whoever catches it may go on with this engine
            self._start_over()
            raise
        self._num_failures = 0
        events = self._fail_without_token(plan, outputs)
        events += self.scheduler.commit(plan, outputs, logprobs, scores, complete)
        times = self.last_step
        times.schedule_s, times.pack_s = scheduled - begin, packed - scheduled
        times.run_s, times.commit_s = ran - packed, time.perf_counter() - ran
        times.num_tokens, times.rows = plan.num_tokens, plan.rows
        return events

    def score(self, token_ids: list[int], *, decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Logits float32 [n, V] of successive chunks of one sequence, through the step's kernels and cache.

        Tokens from `decode_from` on go through one at a time, as generated ones do. Needs an idle engine.
        """
        if self.has_unfinished:
            raise RequestError("score() needs an idle engine: finish or abort the requests first")
        self._check_ids("score", token_ids)
        if len(token_ids) > self.scheduler.max_cached_tokens:
            raise RequestError(f"{len(token_ids)} tokens do not fit the context of {self.scheduler.max_cached_tokens}")
        split = len(token_ids) if decode_from is None else decode_from
        at = 0
        self.scheduler.reset()  # the blocks written below must not be found as anybody's prefix
        pools = self._new_pools()
        block_tables: list[list[int]] = [[] for _ in pools]
        while at < len(token_ids):
            count = min(split - at, self.config.max_step_tokens) if at < split else 1
            shape = self._packer.shape(count, 1, len(token_ids))
            ints = np.zeros(shape.num_ints, np.int32)
            places = np.arange(at, at + count, dtype=np.int32)
            fields = ints[: 6 * shape.num_rows].reshape(6, -1)
            fields[4] = 1
            fields[:5, :count] = (token_ids[at : at + count], places, places, np.zeros_like(places), places + 1)
            tail = ints[6 * shape.num_rows :]
            tail[0] = tail[1] = count
            packed_tables = tail[3:].reshape(shape.num_groups, 1, shape.table_len)
            for pool, table, packed in zip(pools, block_tables, packed_tables, strict=True):
                while len(table) * pool.block_len < at + count:
                    table.append(pool.allocate())
                packed[0, : len(table)] = table
                pool.slide(table, at, at + count)
            try:
                logits, self._caches = self._compiled.logits(self._caches, ints, shape)
                chunk = np.asarray(logits)[:count].copy()
            except BaseException:
                self._start_over()
                raise
            yield chunk
            at += count

    def _check_ids(self, where: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.spec.vocab_size
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{where}: token id {token_id!r} is out of range: this model has ids 0..{vocab_size - 1}"
                )

    def _copy_blocks(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            self._caches = self._compiled.copy_block(self._caches, *copy)

    def _run(
        self, plan: StepPlan, shape: StepShape, ints: np.ndarray, wanted: list[Wanted], rows: list[SampleRow]
    ) -> tuple[list[list[int]], Logprobs | None, Logprobs | None]:
        """New tokens of each row of the plan, their log probabilities, and those of its prompt tokens."""
        outputs: list[list[int]] = [[] for _ in plan.rows]
        if not needs_full(rows):
            sampled, self._caches = self._compiled.step(self._caches, ints, None, shape, 0)
            for (i, _), token_id in zip(wanted, np.asarray(sampled).tolist(), strict=False):
                outputs[i] = [token_id]
            return outputs, None, None
        asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        num_top = 0 if not asked else bucket(max(*asked, 1), 2)
        inputs = build_sample_inputs(rows, shape.num_seqs, self._allowed(rows, shape.num_seqs))
        sampled, self._caches = self._compiled.step(self._caches, ints, inputs, shape, num_top)
        token_ids, chosen, top_ids, top_logprobs = (np.asarray(part) for part in sampled)
        logprobs: Logprobs = [[] for _ in plan.rows]
        scores: Logprobs = [[] for _ in plan.rows]
        for j, (i, scored_token_id) in enumerate(wanted):
            token_id, count = int(token_ids[j]), rows[j].params.logprobs
            if scored_token_id is None:
                outputs[i] = [token_id]
            if count is not None:
                top = zip(top_ids[j, :count].tolist(), top_logprobs[j, :count].tolist(), strict=True)
                into = logprobs if scored_token_id is None else scores
                into[i].append(TokenLogprob(token_id, float(chosen[j]), tuple(top)))
        return outputs, logprobs, scores

    def _sample_row(self, plan: StepPlan, want: Wanted) -> SampleRow:
        seq = self.scheduler.sequence(plan.rows[want.row].seq_id)
        if want.scored_token_id is not None:
            return scoring_row(want.scored_token_id, seq.params.prompt_logprobs or 0)
        row = seq.sample_row
        if row is None:
            row = seq.sample_row = SampleRow.of(seq)
        return row

    @cached_property
    def _grammars(self) -> "Grammars":
        from strop.engine.grammar import Grammars

        return Grammars(self.tokenizer, self.spec.vocab_size, self.config.num_threads)

    def _allowed(self, rows: list[SampleRow], num_rows: int) -> np.ndarray:
        """`SampleInputs.allowed` for so many rows, padding included."""
        matchers = [row.matcher for row in rows]
        return self._grammars.masks(matchers, num_rows) if any(matchers) else ALL_ALLOWED

    def _advance_matchers(
        self,
        plan: StepPlan,
        wanted: list[Wanted],
        rows: list[SampleRow],
        outputs: list[list[int]],
        logprobs: Logprobs | None,
    ) -> set[int]:
        """Tells matchers their answers' new tokens, which they may change; returns the seq_ids of completed answers."""
        complete = set()
        for (i, _), row in zip(wanted, rows, strict=True):
            matcher = row.matcher
            if matcher is None or outputs[i][0] < 0:
                continue
            token_id = row.advance(outputs[i][0])
            if token_id != outputs[i][0]:
                outputs[i] = [token_id]
                if logprobs and logprobs[i]:
                    top = logprobs[i][0].top
                    logprobs[i] = [TokenLogprob(token_id, dict(top).get(token_id, _UNKNOWN_LOGPROB), top)]
            if matcher.is_complete:
                complete.add(plan.rows[i].seq_id)
        return complete

    def _fail_without_token(self, plan: StepPlan, outputs: list[list[int]]) -> list[TokenEvent]:
        """Ends the choices for which no token was left, by the logits or by a grammar; the others go on."""
        events = []
        for row, output in zip(plan.rows, outputs, strict=True):
            if output and output[0] < 0:
                seq = self.scheduler.sequence(row.seq_id)
                request_id, index = seq.request.request_id, seq.index
                self.scheduler.abort(request_id, index)
                matcher = seq.sample_row.matcher
                if matcher is not None and matcher.error is not None:
                    why = f"structured_outputs cannot be enforced any further: {matcher.error}"
                    events.append(TokenEvent(request_id, index, (), (), "abort", why, fault="request"))
                else:
                    why = "the model gave no usable logits (NaN): its weights may be damaged"
                    events.append(TokenEvent(request_id, index, (), (), "abort", why, fault="engine"))
        return events

    def _recover(self, error: Exception) -> None:
        """Starts over after a failed step; raises when the same would only happen again."""
        self._start_over()
        if isinstance(error, StropError):  # refused on purpose: no accident that could pass
            raise error
        self._num_failures += 1
        log.error("a step failed (%d in a row); every sequence starts over", self._num_failures, exc_info=error)
        if self._num_failures >= _MAX_FAILURES:
            self._num_failures = 0
            raise StropError(f"{_MAX_FAILURES} steps failed in a row, the last with {error!r}") from error

    def _start_over(self) -> None:
        """Every sequence keeps its tokens and loses its computed state."""
        self.scheduler.reset()
        self._packer = self._new_packer()
        for cache in self._caches:
            cache.delete()  # a failed step may or may not have consumed it; two would not fit
        self._caches = self._compiled.new_caches(self._num_blocks)

    def _new_scheduler(self, config: EngineConfig) -> Scheduler | ShardedScheduler:
        if self._num_shards == 1:
            return Scheduler(config, self._new_pools(), self.tokenizer.eos_ids)
        seq_ids = count()
        schedulers = [
            Scheduler(config, self._new_pools(), self.tokenizer.eos_ids, seq_ids=seq_ids)
            for _ in range(self._num_shards)
        ]
        return ShardedScheduler(schedulers, self._num_blocks)

    def _new_packer(self) -> Packer:
        config = self.config
        native = self.layout.platform == "native"
        row_multiple = 1
        if isinstance(self.layout, Partition):
            row_multiple = self.layout.mesh.size(self.layout.placement.rows)
        return Packer(
            -(-config.max_num_seqs // self._num_shards) * self._num_shards, self._table_len, config.block_len,
            len(self._groups), padding_is_free=native, row_multiple=row_multiple, num_shards=self._num_shards,
        )  # fmt: skip

    def _new_pools(self) -> list[BlockPool]:
        config = self.config
        return [
            BlockPool(num_blocks, config.block_len, config.prefix_cache, group.window_len)
            for group, num_blocks in zip(self._groups, self._num_blocks, strict=True)
        ]
