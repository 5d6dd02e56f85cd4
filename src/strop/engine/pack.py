"""A StepPlan as one padded host array: the only place where host data becomes the step's input."""

from typing import NamedTuple

import numpy as np

from strop.engine.scheduler import StepPlan


class StepShape(NamedTuple):
    """The bucket of a step: what the compiled function is specialised on."""

    num_rows: int
    """T, token rows."""
    num_seqs: int
    """S, sequences, and rows of logits."""
    table_len: int
    """P, block table entries per sequence."""

    @property
    def num_ints(self) -> int:
        """fields [6, T], counts [2], logit rows [S], block tables [S, P]."""
        return 6 * self.num_rows + 2 + self.num_seqs + self.num_seqs * self.table_len


def bucket(value: int, factor: int, smallest: int = 1) -> int:
    """The smallest of `smallest`, `smallest * factor`, ... that holds `value`."""
    size = smallest
    while size < value:
        size *= factor
    return size


class Packer:
    """Gathers a plan's rows; keeps each sequence's block table as a row of an array between steps."""

    def __init__(self, max_num_seqs: int, max_table_len: int, block_len: int, *, padding_is_free: bool) -> None:
        """`padding_is_free`: the kernels skip padding, so few large buckets (and so few compilations) serve best."""
        self._tables = np.zeros((max_num_seqs, max_table_len), np.int32)
        self._kept: dict[int, list[int]] = {}  # seq_id -> [row of _tables, table_version, entries copied]
        self._free = list(range(max_num_seqs))
        self._block_len = block_len
        self._padding_is_free = padding_is_free

    def shape(self, num_rows: int, num_seqs: int, longest: int) -> StepShape:
        """The bucket for so many token rows and sequences, the longest of which has `longest` tokens."""
        max_table_len = self._tables.shape[1]
        if self._padding_is_free:
            return StepShape(bucket(num_rows, 8, 64), bucket(num_seqs, 8), max_table_len)
        table_len = bucket(-(-longest // self._block_len), 2)
        return StepShape(bucket(num_rows, 4), bucket(num_seqs, 4), min(table_len, max_table_len))

    def pack(self, plan: StepPlan) -> tuple[StepShape, np.ndarray, list[int]]:
        """The bucket, the int32 array laid out as StepShape says, and for each logits row its index in plan.rows."""
        rows = plan.rows
        table_rows = self._table_rows(plan)
        shape = self.shape(plan.num_tokens, len(rows), max(row.start + row.count for row in rows))
        ints = np.zeros(shape.num_ints, np.int32)
        num_rows = shape.num_rows
        fields = ints[: 6 * num_rows].reshape(6, num_rows)
        fields[4, plan.num_tokens :] = 1  # padding sees one slot of the null block
        at, wanted, last_rows = 0, [], []
        for i, row in enumerate(rows):
            if row.count == 1:
                start = row.start
                fields[:, at] = (row.token_ids[0], start, start, 0, start + 1, i)
            else:
                some = slice(at, at + row.count)
                places = np.arange(row.start, row.start + row.count, dtype=np.int32)
                fields[0, some] = row.token_ids
                fields[1, some] = fields[2, some] = places
                fields[4, some] = places + 1
                fields[5, some] = i
            at += row.count
            if row.wants_token:
                wanted.append(i)
                last_rows.append(at - 1)
        tail = ints[6 * num_rows :]
        tail[0], tail[1] = plan.num_tokens, len(wanted)
        tail[2 : 2 + len(wanted)] = last_rows
        tables = tail[2 + shape.num_seqs :].reshape(shape.num_seqs, shape.table_len)
        tables[: len(rows)] = self._tables[table_rows, : shape.table_len]
        return shape, ints, wanted

    def _table_rows(self, plan: StepPlan) -> list[int]:
        if len(self._free) < len(plan.rows):  # rows of sequences that left
            present = {row.seq_id for row in plan.rows}
            for seq_id in [seq_id for seq_id in self._kept if seq_id not in present]:
                self._free.append(self._kept.pop(seq_id)[0])
        table_rows = []
        for row in plan.rows:
            kept = self._kept.get(row.seq_id)
            if kept is None:
                kept = self._kept[row.seq_id] = [self._free.pop(), -1, 0]
            at, version, length = kept
            table = row.block_table
            if version != row.table_version:
                length = 0
            if length != len(table):
                self._tables[at, length : len(table)] = table[length:]
                kept[1], kept[2] = row.table_version, len(table)
            table_rows.append(at)
        return table_rows
