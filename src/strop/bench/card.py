"""What can be said of a model before anything is timed, and what this machine then allows."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from strop import __version__
from strop.bench.limits import LIMITED_ROWS, best_value
from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, UNITS, Workload
from strop.core.config import GIB, MIB
from strop.engine.costs import CostModel
from strop.machine.probe import MachineRates
from strop.models.memory import MemoryPlan


def static_card(costs: CostModel, memory: MemoryPlan) -> dict[str, int]:
    """Bytes and operations, counted from the code that runs."""
    one = costs.decode_step(1, PROMPT_TOKENS + ANSWER_TOKENS // 2)
    return {
        "weight_bytes": memory.weight_bytes,
        "kv_bytes_per_token": memory.cache_bytes_per_token,
        "window_kv_bytes_per_seq": memory.window_bytes_per_seq,
        "flops_per_token": one.total_flops,
        "decode_step_bytes": one.num_bytes,
        "context_tokens": costs.spec.max_context_len,
    }


def describe_card(card: dict[str, int]) -> str:
    """The card for people."""
    window_bytes = card["window_kv_bytes_per_seq"]
    windows = f"plus {window_bytes / MIB:,.1f} MiB per sequence in windowed layers, " if window_bytes else ""
    return (
        f"weights            {card['weight_bytes'] / MIB:,.1f} MiB\n"
        f"cache              {card['kv_bytes_per_token'] / 1024:.1f} KiB per token, {windows}context up to "
        f"{card['context_tokens']:,} tokens\n"
        f"work per token     {card['flops_per_token'] / 1e6:,.1f} MFLOP and {card['decode_step_bytes'] / MIB:,.1f} MiB "
        f"to read at batch 1 (context {PROMPT_TOKENS + ANSWER_TOKENS // 2})"
    )


def describe_rates(rates: MachineRates, costs: CostModel, workloads: list[Workload]) -> str:
    """The machine's peaks and the ceilings that follow."""
    peaks = ", ".join(f"{kind} {rate / 1e12:.2f} T/s" for kind, rate in rates.flops_per_s.items())
    lines = [
        f"machine            {rates.isa}, {rates.num_threads} threads: {peaks}",
        f"read bandwidth     at {rates.working_set_bytes / MIB:.0f} MiB: {rates.read_bytes_per_s / GIB:.1f} GiB/s in "
        f"4 KiB pages, {rates.read_huge_bytes_per_s / GIB:.1f} in 2 MiB pages",
    ]
    for workload in workloads:
        if workload.row in LIMITED_ROWS:
            best = best_value(costs, workload, rates)
            lines.append(f"ceiling            {workload.label}: {best:,.0f} {UNITS[workload.row]}")
    return "\n".join(lines)


def machine_facts(num_threads: int, isa: str | None) -> dict[str, Any]:
    """Which machine this is."""
    processor, total_kib = platform.processor(), 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
        total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return {
        "processor": processor,
        "num_processors": os.cpu_count(),
        "num_threads": num_threads,
        "isa": isa,
        "memory_bytes": total_kib * 1024,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {"strop": __version__, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "numpy"):
        found[package] = metadata.version(package)
    return found
