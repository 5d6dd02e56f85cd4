"""One choice of one request on its way through the engine."""

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from strop.core.request import Request, SamplingParams, TokenLogprob
from strop.engine.group_pools import Tables

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar import Grammar


class State(Enum):
    """WAITING sequences hold no blocks; RUNNING ones hold some for every known token; FINISHED ones are gone."""

    WAITING = 1
    RUNNING = 2
    FINISHED = 3


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known, tokens computed, and the blocks that hold the computed ones. Only the scheduler writes here."""

    seq_id: int
    choices: "Choices"
    index: int
    """Which of the request's n choices."""
    seed: int
    """64 bits for the sampler, fixed at birth: preemption does not change a sampled answer."""
    max_tokens: int
    """Tokens to generate at most: the request's wish, or what the context leaves."""
    finish_token_ids: frozenset[int]
    """End-of-sequence (if heeded) and stop token ids."""
    token_ids: list[int]
    """Prompt, then generated tokens."""
    prompt_len: int
    block_tables: Tables
    """One for each group of layers. Append-only, but for entries that a window passes, until preemption, which puts new
    lists in their place and raises `table_version`."""
    atomic_spans: tuple[tuple[int, int], ...] = ()
    """Half-open token ranges, ascending, that one chunk must cover whole (bidirectional attention inside them)."""
    state: State = State.WAITING
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache. A step catches up from here to len(token_ids)."""
    num_slots: int = 0
    """Tokens that all tables have room for."""
    table_version: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks, as far as anyone asked; they depend on tokens only and outlive preemption."""
    num_published_blocks: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens from the second on, until the first event takes them along."""
    sample_row: Any = None
    """What the sampler keeps about this sequence between steps; the scheduler never looks."""

    @property
    def request(self) -> Request:
        """The request it is a choice of."""
        return self.choices.request

    @property
    def wants_scores(self) -> bool:
        """Whether log probabilities of the prompt are still wanted: of the one choice that computes it, until then."""
        if self.params.prompt_logprobs is None or len(self.token_ids) > self.prompt_len:
            return False
        return not self.choices.held_tables

    @property
    def params(self) -> SamplingParams:
        """The request's."""
        return self.choices.request.params

    @property
    def continues_answer(self) -> bool:
        """Whether all is computed but the newest token of the answer: somebody waits for what follows it."""
        return self.num_computed_tokens == len(self.token_ids) - 1 >= self.prompt_len

    @property
    def num_generated_tokens(self) -> int:
        """Known tokens after the prompt."""
        return len(self.token_ids) - self.prompt_len

    @property
    def generated_token_ids(self) -> list[int]:
        """A copy, in order."""
        return self.token_ids[self.prompt_len :]


@dataclass(slots=True, eq=False)
class Choices:
    """The n answers to one request. One of them, the leader, computes the prompt; then the others fork from it."""

    request: Request
    live: dict[int, Sequence] = field(default_factory=dict)
    """index -> sequence, unfinished ones only."""
    leader: Sequence | None = None
    """Computes the prompt; None once that is done or if there is nothing to share."""
    unforked: dict[int, Sequence] = field(default_factory=dict)
    """seq_id -> sequence that has not started. They join the waiting queue when the prompt is computed."""
    held_tables: Tables = field(default_factory=list)
    """The prompt's blocks in each group, held until the last fork has started, or until space is short."""
    grammar: "Grammar | None" = None
    """What each answer must match."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache when the first choice was admitted; None before that."""

    @property
    def heeds_eos(self) -> bool:
        """Whether the end of sequence ends an answer: in a grammar nothing may follow it, ignored or not."""
        return self.grammar is not None or not self.request.params.ignore_eos


def choice_seed(request_seed: int, index: int) -> int:
    """64-bit seed of one choice. Choice 0 draws the same answer whatever n is."""
    digest = hashlib.sha256(f"{request_seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
