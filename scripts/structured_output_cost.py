"""What structured output adds to a step: plain and constrained batches in turns, medians over all rounds.

python scripts/structured_output_cost.py MODEL --batch 16 --rounds 8
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
# Lists too long to end.
SHAPES: dict[str, StructuredOutputsParams | None] = {
    "plain": None,
    "simple": StructuredOutputsParams(json={"type": "array", "minItems": 1000, "items": PERSON}),
    "nasty": StructuredOutputsParams(json={"type": "array", "minItems": 1000, "items": ANYTHING}),
}


class TimedGrammars(Grammars):
    """Notes how long the masks of each step took."""

    times_s: list[float]

    def masks(self, *args: Any) -> np.ndarray:
        begin_s = time.perf_counter()
        result = super().masks(*args)
        self.times_s.append(time.perf_counter() - begin_s)
        return result


def steps_of(engine: Engine, batch: int, shape: StructuredOutputsParams | None, temperature: float) -> list[float]:
    """Seconds of each step in which all answers got a token."""
    for i in range(batch):
        prompt = f"<|im_start|>user\nWrite a JSON list of people, number {i}.<|im_end|>\n<|im_start|>assistant\n"
        params = SamplingParams(
            temperature=temperature, seed=i, max_tokens=80, ignore_eos=True, structured_outputs=shape
        )
        engine.add(Request(f"r{i}", tuple(engine.tokenizer.encode(prompt)), params))
    times_s = []
    while engine.has_unfinished:
        begin_s = time.perf_counter()
        events = engine.step()
        if len(events) == batch == engine.last_step.num_tokens:
            times_s.append(time.perf_counter() - begin_s)
        assert all(event.finish_reason != "abort" for event in events), events
    return times_s


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
    steps_s: dict[str, list[list[float]]] = {name: [] for name in SHAPES}
    masks_s: dict[str, list[float]] = {name: [] for name in SHAPES}
    for i in range(options.rounds + 1):
        for name, shape in SHAPES.items():
            grammars.times_s = []
            steps = steps_of(engine, options.batch, shape, options.temperature)
            if i > 0:  # the first compiles
                steps_s[name].append(steps)
                masks_s[name] += grammars.times_s
    medians_s = {name: np.array([np.median(steps) for steps in rounds]) for name, rounds in steps_s.items()}
    for name, rounds in steps_s.items():
        ratio = np.median(medians_s[name] / medians_s["plain"])
        median_ms = 1e3 * np.median(np.concatenate(rounds))
        line = f"{name:7} step: median {median_ms:.2f} ms, x {ratio:.3f} of the plain one in its round"
        if masks_s[name]:
            mean, p99 = 1e3 * np.mean(masks_s[name]), 1e3 * np.quantile(masks_s[name], 0.99)
            line += f"; its masks: mean {mean:.2f}, p99 {p99:.2f} ms"
        print(line)


if __name__ == "__main__":
    main()
