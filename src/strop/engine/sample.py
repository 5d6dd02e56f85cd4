"""Host side of sampling: what requests ask for -> the few arrays of `SampleInputs`. No jax."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from strop.core.request import SamplingParams
from strop.engine.sequence import Sequence
from strop.ops.sample import ALL_ALLOWED, NUM_FLOATS, NUM_INTS, SampleInputs

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar import Matcher

SMALLEST_EDIT_BUCKET = 16
EDIT_BUCKET_STEP = 8
"""Each edit bucket is a compiled step; padding costs only a copy, so the ladder is steep."""

PADDING_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
_MASK64 = 2**64 - 1
_OVERWHELMING = 1e29


class SampleRow:
    """How one sequence wants its next token picked. Lives as long as the sequence and keeps count as it grows.

    token_ids is the sequence's own growing list (prompt, then answer), which must only ever be appended to: a step
    reads the tokens that are new since the last one.
    """

    __slots__ = (
        "_bias_of_masked",
        "_biases",
        "_floats",
        "_max_tokens",
        "_num_edits",
        "_num_read",
        "_numbers",
        "_penalised",
        "_plain",
        "_slots",
        "_top_k_and_seed",
        "matcher",
        "params",
        "prompt_len",
        "token_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        token_ids: list[int],
        prompt_len: int,
        *,
        finish_token_ids: Collection[int],
        matcher: "Matcher | None" = None,
        max_tokens: int | None = None,
    ) -> None:
        """seed: its low 64 bits count. finish_token_ids: what min_tokens forbids. matcher: a new one, kept here.

        max_tokens: how many the answer has, and within which its grammar is to be completed.
        """
        self.params = params
        self.token_ids = token_ids
        self.prompt_len = prompt_len
        self._floats = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        seed &= _MASK64
        self._top_k_and_seed = (min(params.top_k, 2**32 - 1), seed & 0xFFFFFFFF, seed >> 32)
        self._penalised = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self._plain = (
            params.temperature == 0.0 and params.logprobs is None and not self._penalised and not params.logit_bias
        )
        self.matcher = matcher
        self._max_tokens = None if max_tokens is None or max_tokens <= params.min_tokens else max_tokens
        if matcher is not None:
            self._plain = False
            for position, token in enumerate(token_ids[prompt_len:]):
                matcher.advance(token, self._num_left_after(position))
        self._slots: dict[int, int] = {}
        self._num_edits = 0
        self._numbers = np.zeros((3, SMALLEST_EDIT_BUCKET), np.int32)  # token, count, seen
        self._biases = np.zeros(SMALLEST_EDIT_BUCKET, np.float32)
        self._num_read = prompt_len
        if params.repetition_penalty != 1.0:
            self._enter_prompt()
        for token, bias in (params.logit_bias or {}).items():
            slot = self._slot(token)
            self._biases[slot] = bias
        self._bias_of_masked: dict[int, float] = {}
        if self.position < params.min_tokens:
            for token in finish_token_ids:
                slot = self._slot(token)
                self._bias_of_masked[slot] = float(self._biases[slot])
                self._biases[slot] = -np.inf

    @classmethod
    def of(cls, seq: Sequence) -> "SampleRow":
        """The row of one sequence, whose token list it goes on reading."""
        grammar = seq.choices.grammar
        return cls(
            seq.params,
            seq.seed,
            seq.token_ids,
            seq.prompt_len,
            finish_token_ids=seq.finish_token_ids,
            matcher=None if grammar is None else grammar.matcher(),
            max_tokens=seq.max_tokens,
        )

    @property
    def position(self) -> int:
        """Index of the token to be sampled among the generated ones."""
        return len(self.token_ids) - self.prompt_len

    @property
    def is_plain(self) -> bool:
        """Greedy, with nothing to edit and no log probabilities to report: an argmax is all it takes."""
        return self._plain and not (self._bias_of_masked and self.position < self.params.min_tokens)

    @property
    def floats(self) -> tuple[float, ...]:
        """One row of `SampleInputs.floats`."""
        return self._floats

    @property
    def ints(self) -> tuple[int, ...]:
        """One row of `SampleInputs.ints`."""
        return (*self._top_k_and_seed, self.position)

    def advance(self, token_id: int) -> int:
        """Tells the matcher the token that was sampled; returns the one to take (`Matcher.advance`)."""
        assert self.matcher is not None
        return self.matcher.advance(token_id, self._num_left_after(self.position))

    def edits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits to change now: i32 [3, n] (token, count, seen), f32 [n] (bias). Views, valid until the next call."""
        if self._bias_of_masked and self.position >= self.params.min_tokens:
            for slot, bias in self._bias_of_masked.items():
                self._biases[slot] = bias
            self._bias_of_masked = {}
        if self._penalised:
            self._count_new_tokens()
        elif not self._bias_of_masked and not self.params.logit_bias:
            self._num_edits = 0
        return self._numbers[:, : self._num_edits], self._biases[: self._num_edits]

    def _num_left_after(self, position: int) -> int | None:
        """Tokens that may follow the one at this position; None if the grammar has no say in that."""
        return None if self._max_tokens is None else self._max_tokens - position - 1

    def _enter_prompt(self) -> None:
        unique = np.unique(np.asarray(self.token_ids[: self.prompt_len], np.int32))
        self._reserve(len(unique))
        self._numbers[0, : len(unique)] = unique
        self._numbers[2, : len(unique)] = 1
        self._slots = {token: slot for slot, token in enumerate(unique.tolist())}
        self._num_edits = len(unique)

    def _count_new_tokens(self) -> None:
        for token in self.token_ids[self._num_read :]:
            slot = self._slot(token)
            self._numbers[1, slot] += 1
            self._numbers[2, slot] = 1
        self._num_read = len(self.token_ids)

    def _slot(self, token: int) -> int:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._num_edits
            self._num_edits += 1
            self._reserve(self._num_edits)
            self._numbers[0, slot] = token
        return slot

    def _reserve(self, num_edits: int) -> None:
        capacity = len(self._biases)
        if num_edits > capacity:
            grown = max(num_edits, 2 * capacity) - capacity
            self._numbers = np.pad(self._numbers, ((0, 0), (0, grown)))
            self._biases = np.pad(self._biases, (0, grown))


def scoring_row(token_id: int, num_logprobs: int) -> SampleRow:
    """Picks a given token, so that its log probability, which no bias changes, comes with those of the best ones."""
    params = SamplingParams(temperature=0.0, logprobs=num_logprobs, logit_bias={token_id: _OVERWHELMING})
    return SampleRow(params, 0, [], 0, finish_token_ids=())


def needs_full(rows: list[SampleRow]) -> bool:
    """Whether the step needs `sample`; if not, `greedy` gives the same tokens from the logits alone."""
    return not all(row.is_plain for row in rows)


def edit_bucket(num_edits: int) -> int:
    """Static length of the edit lists for this many edits."""
    bucket = SMALLEST_EDIT_BUCKET
    while bucket < num_edits:
        bucket *= EDIT_BUCKET_STEP
    return bucket


def build_sample_inputs(rows: list[SampleRow], num_rows_padded: int, allowed: np.ndarray = ALL_ALLOWED) -> SampleInputs:
    """Host arrays for one step: row i of the logits is rows[i]'s, later ones are padding (greedy, no edits).

    `allowed` is that of `SampleInputs`, padding included.

    Raises ValueError when there are more rows than num_rows_padded.
    """
    if len(rows) > num_rows_padded:
        raise ValueError(f"{len(rows)} rows do not fit {num_rows_padded}")
    floats = np.empty((num_rows_padded, NUM_FLOATS), np.float32)
    floats[len(rows) :] = PADDING_FLOATS
    ints = np.zeros((num_rows_padded, NUM_INTS), np.uint32)
    if rows:
        floats[: len(rows)] = [row.floats for row in rows]
        ints[: len(rows)] = [row.ints for row in rows]

    edits = [(i, *row.edits()) for i, row in enumerate(rows)]
    edits = [(i, numbers, biases) for i, numbers, biases in edits if len(biases)]
    bucket = edit_bucket(sum(len(biases) for _, _, biases in edits))
    edit_row = np.full(bucket, -1, np.int32)
    edit_numbers = np.zeros((3, bucket), np.int32)
    edit_bias = np.zeros(bucket, np.float32)
    begin = 0
    for i, numbers, biases in edits:
        end = begin + len(biases)
        edit_row[begin:end] = i
        edit_numbers[:, begin:end] = numbers
        edit_bias[begin:end] = biases
        begin = end
    edit_token, edit_count, edit_seen = edit_numbers
    return SampleInputs(floats, ints, edit_row, edit_token, edit_count, edit_seen, edit_bias, allowed)
