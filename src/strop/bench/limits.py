"""The most a workload can reach on this machine."""

from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, RowName, Workload
from strop.engine.costs import CostModel
from strop.machine.probe import MachineRates

LIMITED_ROWS: tuple[RowName, ...] = ("decode", "throughput", "prefill")
"""The workloads that have a limit."""


def best_value(costs: CostModel, workload: Workload, rates: MachineRates) -> float:
    """The value of `workload`, one of LIMITED_ROWS, at the machine's limit."""
    batch = workload.amount
    if workload.row == "prefill":
        return workload.amount / costs.prefill(1, workload.amount).limit_s(rates)
    # A step's time is linear in its context, so the middle step stands for all.
    step_s = costs.decode_step(batch, PROMPT_TOKENS + ANSWER_TOKENS // 2).limit_s(rates)
    if workload.row == "decode":
        return batch / step_s
    prefill_s = costs.prefill(batch, PROMPT_TOKENS).limit_s(rates)
    return batch * ANSWER_TOKENS / (prefill_s + (ANSWER_TOKENS - 1) * step_s)
