"""What one step computes: plain data from the scheduler to whoever runs the step."""

from dataclasses import dataclass

import msgspec

from strop.engine.group_pools import Tables
from strop.engine.sequence import Sequence


class StepRow(msgspec.Struct, frozen=True):
    """One sequence's share of a step: compute tokens [start, start + count), attend to [0, start + count)."""

    seq_id: int
    start: int
    count: int
    token_ids: tuple[int, ...]
    """The `count` tokens."""
    block_tables: Tables
    """One for each group of layers. In group g token t lies in slot t % block_len of block_tables[g][t // block_len].
    Covers at least [0, start + count); NULL_BLOCK stands for what the group's window has passed.

    These are the sequence's own lists, not copies: read them before the next `schedule`, never write. While a seq_id's
    `table_version` stays the same they only grow at their ends, but for entries that the window passes: a copy can be
    kept and extended."""
    table_version: int
    num_slots: int
    """Tokens that all tables have room for; grows when one of them does."""
    wants_token: bool
    """Whether the last token's logits are to be sampled (the row reaches the end of the known tokens)."""
    num_prompt_tokens: int
    """How many of the `count` tokens, from the first, belong to the prompt; the rest were generated."""
    scored_token_ids: tuple[int, ...] = ()
    """Prompt tokens whose log probabilities are wanted: the first of them after the row's first token, and so on."""
    num_draft_tokens: int = 0
    """How many of the last tokens are guesses to verify."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Plain data: what one step computes."""

    rows: tuple[StepRow, ...]
    copies: tuple[tuple[int, int, int], ...]
    """(group, source, destination) blocks to copy before anything is computed. Within a group destinations are distinct
    and none of them is also a source: any order will do."""
    num_tokens: int
    """Sum of the rows' counts."""
    rows_of_shards: tuple[int, ...] = ()
    """Where attention is sharded over the batch: how many of the rows, in order, each device has in its cache."""


def step_row(seq: Sequence, start: int, end: int) -> StepRow:
    """The sequence's share of a step that computes its tokens [start, end)."""
    token_ids = seq.token_ids
    return StepRow(
        seq.seq_id,
        start,
        end - start,
        (token_ids[start],) if end - start == 1 else tuple(token_ids[start:end]),
        seq.block_tables,
        seq.table_version,
        seq.num_slots,
        end == len(token_ids),
        max(0, min(seq.prompt_len, end) - start),
        tuple(token_ids[start + 1 : min(end + 1, seq.prompt_len)]) if seq.wants_scores else (),
    )
