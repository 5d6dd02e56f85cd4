"""What is measured. Every engine gets the same amounts of work."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

RowName = Literal["decode", "throughput", "prefill", "start", "rss"]
ROW_NAMES: tuple[RowName, ...] = ("decode", "throughput", "prefill", "start", "rss")

PROMPT_TOKENS = 128
ANSWER_TOKENS = 128
PREFILL_TOKENS = (512, 2048)
UNITS: dict[RowName, str] = {
    "decode": "tokens/s",
    "throughput": "tokens/s",
    "prefill": "tokens/s",
    "start": "s",
    "rss": "MiB",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the report.

    - decode: `amount` requests of PROMPT_TOKENS; the rate of the steps that take in tokens 129 to 256, nothing else.
    - throughput: `amount` requests of PROMPT_TOKENS, ANSWER_TOKENS each, from the first request in to the last token.
    - prefill: one prompt of `amount` tokens; its tokens over the time to the first token.
    - start: from starting a process to its first token, with caches warm.
    - rss: peak memory of that process after PROMPT_TOKENS in, ANSWER_TOKENS out.
    """

    row: RowName
    amount: int = 1

    @property
    def params(self) -> dict[str, int]:
        """As the report names the amount."""
        return {"tokens": self.amount} if self.row == "prefill" else {"batch": self.amount}

    @property
    def label(self) -> str:
        """For people: `decode, batch 8`."""
        return ", ".join([self.row, *(f"{name} {value}" for name, value in self.params.items())])

    @property
    def more_is_better(self) -> bool:
        """Whether the value is a rate."""
        return self.row not in ("start", "rss")


def workloads(rows: set[str], batches: list[int]) -> list[Workload]:
    """The chosen rows in the report's order."""
    all_of_them = [
        *(Workload("decode", batch) for batch in batches),
        *(Workload("throughput", batch) for batch in batches),
        *(Workload("prefill", num_tokens) for num_tokens in PREFILL_TOKENS),
        Workload("start"),
        Workload("rss"),
    ]
    return [workload for workload in all_of_them if workload.row in rows]


def prompts(num_prompts: int, prompt_len: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids that no two prompts and no two seeds share, so that no prefix cache helps anyone."""
    rng = np.random.default_rng(seed)
    return [tuple(map(int, ids)) for ids in rng.integers(vocab_size // 16, vocab_size, (num_prompts, prompt_len))]
