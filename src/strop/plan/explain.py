"""The card of a configuration: every operation and exchange of its two passes, and what each waits for."""

from dataclasses import asdict, dataclass
from typing import Any

from strop.plan.candidate import Candidate
from strop.plan.latency import Pass
from strop.plan.passes import CardRow, PassTime


@dataclass(frozen=True, slots=True)
class Card:
    """A pass, op by op."""

    title: str
    seconds: float
    rows: tuple[CardRow, ...]
    parts_s: dict[str, float]
    """By what it waits for: compute, weights, cache, links, overhead."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def explain(chosen: Candidate) -> list[Card]:
    """The passes that take prompts in, and the steps that continue answers."""
    prompt, batch = chosen.prompt_pass, chosen.batch
    seen = f", {chosen.mean_context_len} tokens of context" if chosen.mean_context_len else ""
    whole = "a prompt" if prompt.batch == 1 else f"{prompt.batch} prompts"
    what = f"{whole} of {prompt.new_tokens}" if chosen.passes_per_prompt == 1 else f"{prompt.new_tokens} of a prompt's"
    return [
        _card(f"prompt: {what} tokens", chosen, prompt, chosen.prompt),
        _card(
            f"decode: a token for each of {batch}{seen}", chosen, Pass(batch, 1, chosen.mean_context_len), chosen.decode
        ),
    ]


def _card(title: str, chosen: Candidate, step: Pass, time: PassTime) -> Card:
    model, placed = chosen.model, time.placed
    where = "one device"
    if placed is not None and model.num_devices > 1:
        where = f"{placed.layout}, attention over {placed.sharding}"
    rows = tuple(model.card_rows(step, time))
    return Card(f"{title} ({where})", time.seconds, rows, model.parts(step, time))
