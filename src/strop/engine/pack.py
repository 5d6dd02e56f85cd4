"""A StepPlan as one padded host array: the only place where host data becomes the step's input."""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from strop.engine.step_plan import StepPlan, StepRow


class StepShape(NamedTuple):
    """The bucket of a step: what the compiled function is specialised on."""

    num_rows: int
    """T, token rows."""
    num_seqs: int
    """S, sequences, and rows of logits."""
    table_len: int
    """P, entries of a block table."""
    num_groups: int
    """G, groups of layers, with a block table each per sequence."""

    @property
    def num_ints(self) -> int:
        """fields [6, T], counts [2], logit rows [S], block tables [G, S, P]."""
        return 6 * self.num_rows + 2 + self.num_seqs + self.num_groups * self.num_seqs * self.table_len


class Wanted(NamedTuple):
    """What a row of logits is for."""

    row: int
    """Index in plan.rows."""
    scored_token_id: int | None
    """The prompt's token whose log probability is asked; None: a token is to be sampled."""


def bucket(value: int, factor: int, smallest: int = 1) -> int:
    """The smallest of `smallest`, `smallest * factor`, ... that holds `value`."""
    size = smallest
    while size < value:
        size *= factor
    return size


def _tokens_of_shards(plan: StepPlan) -> list[tuple[int, int]]:
    """Where the tokens of each device's rows begin and end among all tokens."""
    ends = [0, *accumulate(row.count for row in plan.rows)]
    bounds = [ends[num_rows] for num_rows in accumulate(plan.rows_of_shards, initial=0)]
    return list(pairwise(bounds))


# Reads slot 0 of the first sequence; nobody reads its result.
_PADDING = np.array([[0], [0], [0], [0], [1], [0]], np.int32)


class _Buffer:
    """A bucket's array, kept from step to step: what does not change need not be written again."""

    def __init__(self, shape: StepShape) -> None:
        self.ints = np.zeros(shape.num_ints, np.int32)
        self.fields = self.ints[: 6 * shape.num_rows].reshape(6, shape.num_rows)
        self.fields[:] = _PADDING
        self.num_tokens = 0
        self.tail = self.ints[6 * shape.num_rows :]
        self.tables = self.tail[2 + shape.num_seqs :].reshape(shape.num_groups, shape.num_seqs, shape.table_len)
        self.tables_of: tuple[list[int], int] = ([], -1)
        """Which rows of the packer's tables, as of which of their changes."""


@dataclass(slots=True)
class _Kept:
    """What the packer has of a sequence."""

    at: int
    """Its row of the packer's tables."""
    version: int = -1
    num_slots: int = 0
    lengths: list[int] = field(default_factory=list)
    """Entries copied of the table of each group."""


class Packer:
    """Gathers a plan's rows; keeps each sequence's block tables as a row of an array between steps.

    Entries that a window has passed may stay there as they were: no row sees them.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_table_len: int,
        block_len: int,
        num_groups: int,
        *,
        padding_is_free: bool,
        row_multiple: int = 1,
        num_shards: int = 1,
    ) -> None:
        """
        Args:
            padding_is_free: the kernels skip padding, so few large buckets (and so few compilations) serve best.
            row_multiple: of which the token rows of every bucket are a multiple.
            num_shards: devices with sequences of their own, each of which takes an equal part of the token rows.
        """
        self._tables = np.zeros((num_groups, max_num_seqs, max_table_len), np.int32)
        self._kept: dict[int, _Kept] = {}  # by seq_id
        self._free = list(range(max_num_seqs))
        self._num_changes = 0  # of _tables
        self._buffers: dict[StepShape, _Buffer] = {}
        self._block_len = block_len
        self._padding_is_free = padding_is_free
        self._row_multiple = row_multiple
        self._num_shards = num_shards

    def shape(self, num_rows: int, num_seqs: int, longest: int) -> StepShape:
        """The bucket for so many token rows (of each device, where these have their own) and sequences, the longest of
        which has `longest` tokens."""
        num_groups, _, max_table_len = self._tables.shape
        if self._padding_is_free:
            rows = bucket(num_rows, 8, 64) * self._num_shards
            return StepShape(rows + -rows % self._row_multiple, bucket(num_seqs, 8), max_table_len, num_groups)
        table_len = bucket(-(-longest // self._block_len), 2)
        rows = (
            bucket(num_rows, 4) * self._num_shards if self._num_shards > 1 else bucket(num_rows, 4, self._row_multiple)
        )
        return StepShape(rows, bucket(num_seqs, 4), min(table_len, max_table_len), num_groups)

    def pack(self, plan: StepPlan) -> tuple[StepShape, np.ndarray, list[Wanted]]:
        """The bucket, the int32 array laid out as StepShape says, and what each row of logits is for.

        The array is the bucket's own: the next step of this bucket overwrites it.
        """
        rows = plan.rows
        table_rows = self._table_rows(plan)
        num_logits = sum(row.wants_token + len(row.scored_token_ids) for row in rows)
        longest = max(row.start + row.count for row in rows)
        of_shards = _tokens_of_shards(plan) if plan.rows_of_shards else []
        most = max((end - begin for begin, end in of_shards), default=plan.num_tokens)
        shape = self.shape(most, max(len(rows) + bool(of_shards), num_logits), longest)
        buffer = self._buffers.get(shape)
        if buffer is None:
            buffer = self._buffers[shape] = _Buffer(shape)
        token_ids: list[int] = []
        places: list[int] = []
        seqs: list[int] = []
        wanted: list[Wanted] = []
        logit_rows: list[int] = []
        for i, row in enumerate(rows):
            if row.scored_token_ids:
                wanted += [Wanted(i, token_id) for token_id in row.scored_token_ids]
                logit_rows += range(len(places), len(places) + len(row.scored_token_ids))
            token_ids += row.token_ids
            places += range(row.start, row.start + row.count)
            seqs += [i] * row.count
            if row.wants_token:
                wanted.append(Wanted(i, None))
                logit_rows.append(len(places) - 1)
        num_tokens = len(places)
        fields = (token_ids, places, places, [0] * num_tokens, [place + 1 for place in places], seqs)
        if of_shards:
            logit_rows = self._spread(np.array(fields, np.int32), of_shards, logit_rows, buffer, shape)
            num_tokens = shape.num_rows
        else:
            buffer.fields[:, :num_tokens] = fields
        if num_tokens < buffer.num_tokens:
            buffer.fields[:, num_tokens : buffer.num_tokens] = _PADDING
        buffer.num_tokens = num_tokens
        buffer.tail[: 2 + len(wanted)] = (num_tokens, len(wanted), *logit_rows)
        if buffer.tables_of != (table_rows, self._num_changes):
            buffer.tables[:, : len(rows)] = self._tables[:, table_rows, : shape.table_len]
            buffer.tables_of = (table_rows, self._num_changes)
        return shape, buffer.ints, wanted

    def _spread(
        self,
        fields: np.ndarray,
        of_shards: list[tuple[int, int]],
        logit_rows: list[int],
        buffer: _Buffer,
        shape: StepShape,
    ) -> list[int]:
        """Writes each device's tokens into its part of the buffer; returns where the rows of logits are then.

        What is left of the parts is computed, too, since only the end of all rows can be left out: it belongs to the
        last sequence, which nobody has, and whose blocks are the null block.
        """
        of_each = shape.num_rows // self._num_shards
        buffer.fields[:] = _PADDING
        buffer.fields[5] = shape.num_seqs - 1
        moved = np.zeros(fields.shape[1], np.int32)
        for shard, (begin, end) in enumerate(of_shards):
            at = shard * of_each
            buffer.fields[:, at : at + end - begin] = fields[:, begin:end]
            moved[begin:end] = at - begin
        return [row + int(moved[row]) for row in logit_rows]

    def _table_rows(self, plan: StepPlan) -> list[int]:
        if len(self._free) < len(plan.rows):  # rows of sequences that left
            present = {row.seq_id for row in plan.rows}
            for seq_id in [seq_id for seq_id in self._kept if seq_id not in present]:
                self._free.append(self._kept.pop(seq_id).at)
        table_rows = []
        for row in plan.rows:
            kept = self._kept.get(row.seq_id)
            if kept is None:
                kept = self._kept[row.seq_id] = _Kept(self._free.pop())
            if kept.version != row.table_version or kept.num_slots != row.num_slots:
                self._copy(row, kept)
            table_rows.append(kept.at)
        return table_rows

    def _copy(self, row: StepRow, kept: _Kept) -> None:
        """Takes over what has been added to the tables of a row's sequence."""
        if kept.version != row.table_version:
            kept.lengths = [0] * len(row.block_tables)
        for into, table, length in zip(self._tables[:, kept.at], row.block_tables, kept.lengths, strict=True):
            into[length : len(table)] = table[length:]
        kept.version, kept.num_slots = row.table_version, row.num_slots
        kept.lengths = [len(table) for table in row.block_tables]
        self._num_changes += 1
