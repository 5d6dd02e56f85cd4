"""What structured output costs: free text and constrained batches of the same lengths in turns, medians over rounds.

python scripts/structured_output_cost.py MODEL --batch 16 --rounds 8

Tokens per second count everything from the first request's arrival to the last token: prompts and grammars included.
"""

import argparse
import time
from typing import Any

import numpy as np

from strop.core.config import EngineConfig
from strop.core.request import Request, SamplingParams, StructuredOutputsParams
from strop.engine.engine import Engine
from strop.engine.grammar import Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WORDS = r"^[A-Za-z\p{L} ,.'-]+$"
RECORD = {
    "type": "object",
    "properties": {
        f"field_{i}": {"type": ["string", "number", "null"], "maxLength": 40, "pattern": WORDS} for i in range(60)
    },
    "patternProperties": {"^x_[a-z]{2,20}$": {"format": "email"}, r"^\d+$": {"type": "number", "minimum": -1.5}},
    "additionalProperties": {"enum": [f"value number {i}" for i in range(500)]},
}
ANYTHING = {"anyOf": [RECORD, {"type": "string", "format": "date-time"}, {"type": "number", "multipleOf": 0.25}]}
ANSWER_TOKENS = 80
# Lists too long to end, and one whose answers must be led to their end.
SHAPES: dict[str, StructuredOutputsParams | None] = {
    "plain": None,
    "simple": StructuredOutputsParams(json={"type": "array", "minItems": 1000, "items": PERSON}),
    "nasty": StructuredOutputsParams(json={"type": "array", "minItems": 1000, "items": ANYTHING}),
    "ending": StructuredOutputsParams(json={"type": "array", "minItems": 2, "items": PERSON}),
}


class TimedGrammars(Grammars):
    """Notes how long the masks of each step took."""

    times_s: list[float]

    def masks(self, *args: Any) -> np.ndarray:
        begin_s = time.perf_counter()
        result = super().masks(*args)
        self.times_s.append(time.perf_counter() - begin_s)
        return result


def run(engine: Engine, batch: int, shape: StructuredOutputsParams | None, temperature: float) -> tuple[float, float]:
    """Tokens per second, and the median of the seconds of each step in which all answers got a token."""
    times_s, num_tokens = [], 0
    begun_s = time.perf_counter()
    for i in range(batch):
        prompt = f"<|im_start|>user\nWrite a JSON list of people, number {i}.<|im_end|>\n<|im_start|>assistant\n"
        params = SamplingParams(
            temperature=temperature, seed=i, max_tokens=ANSWER_TOKENS, ignore_eos=True, structured_outputs=shape
        )
        engine.add(Request(f"r{i}", tuple(engine.tokenizer.encode(prompt)), params))
    while engine.has_unfinished:
        step_s = time.perf_counter()
        events = engine.step()
        if len(events) == batch == engine.last_step.num_tokens:
            times_s.append(time.perf_counter() - step_s)
        num_tokens += sum(len(event.token_ids) for event in events)
        assert all(event.finish_reason != "abort" for event in events), events
    return num_tokens / (time.perf_counter() - begun_s), float(np.median(times_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    options = parser.parse_args()
    engine = Engine.load(options.model, EngineConfig(max_num_seqs=options.batch, max_context_len=1024))
    grammars = TimedGrammars(engine.tokenizer, engine.spec.vocab_size, engine.config.num_threads)
    vars(engine)["_grammars"] = grammars
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in SHAPES}
    masks_s: dict[str, list[float]] = {name: [] for name in SHAPES}
    for i in range(options.rounds + 1):
        for name in sorted(SHAPES, key=lambda name: hash((i, *name.encode()))):
            grammars.times_s = []
            taken = run(engine, options.batch, SHAPES[name], options.temperature)
            if i > 0:  # the first compiles
                figures[name].append(taken)
                masks_s[name] += grammars.times_s
    plain = np.array(figures["plain"])
    for name, rounds in figures.items():
        rate, step_s = np.median(rounds, axis=0)
        ratios = np.array(rounds) / plain
        low, ratio, high = np.quantile(ratios[:, 0], (0.25, 0.5, 0.75))
        line = f"{name:6} {rate:6.0f} tokens/s, x {ratio:.3f} ({low:.3f} - {high:.3f}) of free text in its round; "
        line += f"step {1e3 * step_s:.2f} ms, x {np.median(ratios[:, 1]):.3f}"
        if masks_s[name]:
            mean, p99 = 1e3 * np.mean(masks_s[name]), 1e3 * np.quantile(masks_s[name], 0.99)
            line += f"; its masks: mean {mean:.2f}, p99 {p99:.2f} ms"
        print(line)


if __name__ == "__main__":
    main()
