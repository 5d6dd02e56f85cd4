"""The least time that a step could have taken on this machine, cheap enough to be worked out for every one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from strop.engine.costs import CostModel
from strop.engine.step_plan import StepRow
from strop.machine.memory import available_bytes
from strop.machine.probe import MOST_PROBED_BYTES, MachineRates, probe
from strop.models.layout import Single
from strop.ops import native
from strop.ops.attention import AttentionCall
from strop.ops.cost import Cost

if TYPE_CHECKING:
    from strop.engine.engine import Engine

log = logging.getLogger(__name__)

_PROBES_S = (0.25, 0.5)  # the second for a machine that was too busy at the first
_NUM_ROWS, _NUM_LOGITS = 2, 1  # unlike: an operation's number of rows tells whether it is of all rows or of the last


@dataclass(slots=True)
class _Least:
    """Seconds that some work takes at least, by what binds it."""

    compute_s: float = 0.0
    memory_s: float = 0.0

    def add(self, cost: Cost, rates: MachineRates, times: int = 1) -> None:
        """So many times this work more."""
        self.compute_s += times * cost.flops / rates.flops_per_s[cost.kind]
        self.memory_s += times * (cost.bytes_read + cost.bytes_written) / rates.best_read_bytes_per_s


class StepLimit:
    """A step's costs, as strop.engine.costs counts them, as sums over its rows whose factors are found once."""

    def __init__(self, costs: CostModel, rates: MachineRates) -> None:
        """`rates` must be positive."""
        self._step, self._row, self._logits, self._logit = _Least(), _Least(), _Least(), _Least()
        self._slots: dict[int | None, _Least] = {}
        """By window: for a slot that a row sees, and for one that is read."""
        for call, times in costs.calls(_NUM_ROWS, _NUM_LOGITS):
            fixed, each = (self._logits, self._logit) if call.num_rows == _NUM_LOGITS else (self._step, self._row)
            one, two = (costs.cost(replace(call, num_rows=num_rows)) for num_rows in (1, 2))
            each.add(two, rates, times)
            each.add(one, rates, -times)
            fixed.add(one, rates, 2 * times)
            fixed.add(two, rates, -times)
            if isinstance(call, AttentionCall):
                slot = self._slots.setdefault(call.window_len, _Least())
                slot.add(costs.cost(call, 1, 1), rates, times)
                slot.add(costs.cost(call), rates, -times)

    def seconds(self, rows: Sequence[StepRow]) -> float:
        """At least, for a step that computes these rows."""
        num_rows = sum(row.count for row in rows)
        num_logits = sum(row.wants_token + len(row.scored_token_ids) for row in rows)
        compute_s = self._step.compute_s + num_rows * self._row.compute_s + num_logits * self._logit.compute_s
        memory_s = self._step.memory_s + num_rows * self._row.memory_s + num_logits * self._logit.memory_s
        if num_logits:
            compute_s += self._logits.compute_s
            memory_s += self._logits.memory_s
        for window_len, slot in self._slots.items():
            seen = read = 0
            for row in rows:
                start, count = row.start, row.count
                end = start + count
                if window_len is None or end <= window_len:
                    seen += count * (start + end + 1) // 2
                    read += end
                else:
                    growing = max(0, window_len - start)  # rows that see all before them
                    seen += growing * (start + start + growing + 1) // 2 + (count - growing) * window_len
                    read += min(end, window_len + count - 1)
            compute_s += seen * slot.compute_s
            memory_s += read * slot.memory_s
        return max(compute_s, memory_s)


def step_limit(engine: "Engine") -> StepLimit | None:
    """Of a loaded engine; probes the machine for a moment. None without native kernels to probe with, or on a mesh."""
    is_single = isinstance(engine.layout, Single)
    library = native.library() if is_single and engine.layout.platform == "native" else None
    if library is None:
        return None
    working_set_bytes = max(1, min(engine.memory.weight_bytes, MOST_PROBED_BYTES, available_bytes() // 4))
    for seconds in _PROBES_S:
        rates = probe(library, working_set_bytes, engine.config.num_threads, seconds)
        if min(*rates.flops_per_s.values(), rates.best_read_bytes_per_s) > 0:
            return StepLimit(CostModel(engine.params, engine.spec, engine.layout), rates)
    log.warning("this machine is too busy to be probed: the share of its limit will not be known")
    return None
