"""The card of a configuration: every operation and exchange of its two passes, and what each waits for."""

import operator
from dataclasses import asdict, dataclass
from typing import Any

from strop.plan.candidate import Candidate
from strop.plan.latency import Pass, Term
from strop.plan.passes import Partitioned, PassTime, rooflines


@dataclass(frozen=True, slots=True)
class CardRow:
    """An operation or exchange, all its occurrences in a pass together, on each device."""

    name: str
    count: int
    flops: float
    memory_bytes: float
    sent_bytes: float
    seconds: float
    """That it adds: an exchange looped with a product adds what the product does not hide."""
    share: float
    binds: str


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
    model = chosen.model
    assert time.placed is not None and isinstance(model, Partitioned), "only the closed forms have terms"
    rows = []
    for term, count in model.terms(step, time.placed):
        seconds = count * term.seconds.total
        if not (seconds or term.flops or term.sent_bytes):
            continue
        rows.append(
            CardRow(
                name=term.name,
                count=count,
                flops=count * term.flops,
                memory_bytes=count * term.num_bytes,
                sent_bytes=count * term.sent_bytes,
                seconds=seconds,
                share=seconds / time.seconds,
                binds=_binds(term, model),
            )
        )
    placed = f"{time.placed.layout}, attention over {time.placed.sharding}" if model.num_devices > 1 else "one device"
    return Card(f"{title} ({placed})", time.seconds, tuple(rows), model.parts(step, time))


def _binds(term: Term, model: Partitioned) -> str:
    if term.sent_bytes:
        return "links" if term.seconds.links > term.seconds.latency else "overhead"
    if not term.flops:
        return "overhead"
    if operator.gt(*rooflines(term, model.device, model.coefficients)):
        return "compute"
    return "cache" if term.seconds.attention else "weights"
