"""How good a model is on a text, and how far from a reference model: what `strop eval` measures."""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, UnsupportedError
from strop.engine.loading import load_model, load_tokenizer
from strop.formats.checkpoint import AnyCheckpoint, open_checkpoint
from strop.models.reader import load_spec

if TYPE_CHECKING:  # the fidelity module drags in jax, and a wrong file name should be told at once
    from strop.bench.fidelity import Fidelity, Interval


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What `strop eval` was asked."""

    model: str
    reference: str | None = None
    text: str | None = None
    """None: the built-in English text."""
    max_windows: int = 9
    window_tokens: int = 512
    one_by_one: bool = False
    """Score tokens as if they were generated, one per step, instead of as a prompt."""
    num_threads: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, with 95 % bootstrap intervals."""

    model: str
    source_hash: str
    reference: str | None
    reference_hash: str | None
    num_text_tokens: int
    num_windows: int
    window_tokens: int
    num_positions: int
    perplexity: "Interval"
    reference_perplexity: "Interval | None" = None
    fidelity: "Fidelity | None" = None
    """The model's distance from the reference, which runs in float32."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"measured on         {self.num_positions:,} positions in {self.num_windows} windows of "
            f"{self.window_tokens} tokens; the text has {self.num_text_tokens:,}",
            f"perplexity            {_shown(self.perplexity, '.4g')}",
        ]
        if self.fidelity is not None and self.reference_perplexity is not None:
            lines += [
                f"reference perplexity  {_shown(self.reference_perplexity, '.4g')}",
                f"perplexity ratio      {_shown(self.fidelity.perplexity_ratio, '.5f')}",
                f"KL divergence         {_shown(self.fidelity.kl_nat, '.3e')} nat",
                f"top-1 agreement       {_shown(self.fidelity.top1_agreement, '.2%')}",
            ]
        return "\n".join(lines)


def _shown(interval: "Interval", form: str) -> str:
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def evaluate(options: EvalOptions, say: Callable[[str], None]) -> Evaluation:
    """Measures. The reference comes first and is gone from memory when the model is loaded.

    Args:
        say: gets a line for people as each part begins.

    Raises:
        RequestError: the text is too short, or the two models' vocabularies differ.
        StropError: a model cannot be loaded.
    """
    checkpoint = open_checkpoint(options.model)
    other = open_checkpoint(options.reference) if options.reference is not None else None
    spec, tokenizer = load_spec(checkpoint), load_tokenizer(checkpoint)
    tokenizer.fit_embedding(spec.vocab_size)
    if not spec.causal:
        raise UnsupportedError(f"{options.model}: an encoder gives no next tokens to score: pass a language model")
    window_tokens = min(options.window_tokens, spec.max_context_len)

    import numpy as np

    from strop.bench import fidelity

    text = fidelity.english_text() if options.text is None else options.text
    ids, prefix = tokenizer.encode(text, add_special=False), tokenizer.encode("")
    if other is not None:
        window_tokens = min(window_tokens, load_spec(other).max_context_len)
        _refuse_other_vocabulary(spec.vocab_size, [*prefix, *ids], text, other)
    windows = fidelity.token_windows(np.array(ids, np.int32), options.max_windows, window_tokens, prefix)
    reference = None
    if other is not None:
        say(f"running the reference in float32: {windows.size:,} tokens of {other.path}")
        reference = fidelity.Reference(str(other.path), windows)

    from strop.engine.engine import Engine

    config = EngineConfig(max_num_seqs=1, max_context_len=windows.shape[1], num_threads=options.num_threads)
    engine = Engine(*load_model(options.model, config, on_plan=lambda plan: say(plan.describe())))
    ours, theirs = fidelity.Likelihood(), fidelity.Likelihood()
    passing = ours.watch(fidelity.our_logits(engine, windows, one_by_one=options.one_by_one), windows)
    distance = None
    if reference is not None:
        distance = reference.compare(passing)
        deque(theirs.watch(reference.logits, windows), maxlen=0)
    else:
        deque(passing, maxlen=0)
    return Evaluation(
        model=options.model,
        source_hash=checkpoint.source_hash(),
        reference=options.reference,
        reference_hash=None if other is None else other.source_hash(),
        num_text_tokens=len(ids),
        num_windows=len(windows),
        window_tokens=windows.shape[1],
        num_positions=len(windows) * (windows.shape[1] - 2),
        perplexity=ours.perplexity,
        reference_perplexity=None if reference is None else theirs.perplexity,
        fidelity=distance,
    )


def _refuse_other_vocabulary(vocab_size: int, ids: list[int], text: str, other: AnyCheckpoint) -> None:
    theirs = load_spec(other).vocab_size
    if theirs != vocab_size:
        raise RequestError(
            f"the vocabularies differ: the model has {vocab_size:,} tokens, the reference {other.path} has {theirs:,};"
            " only models with the same tokens can be compared"
        )
    tokenizer = load_tokenizer(other)
    their_ids = [*tokenizer.encode("", add_special=True), *tokenizer.encode(text, add_special=False)]
    if their_ids != ids:
        at = next((i for i, pair in enumerate(zip(ids, their_ids, strict=False)) if pair[0] != pair[1]), "the end")
        raise RequestError(
            f"the vocabularies differ: the model and the reference {other.path} make different tokens of the text, from"
            f" token {at} on; only models with the same tokens can be compared"
        )
