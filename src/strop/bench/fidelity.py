"""How far next-token distributions are from float32 on the same dequantised weights: teacher forcing, plain English.

KL(reference || measured) in nats, per position, with bootstrap intervals. The reference is our own decoder on its
reference operations, all in float32, without a cache.
"""

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

from strop.bench.peers import TopLogprobs
from strop.core.config import GIB
from strop.core.errors import CapacityError, RequestError, StropError
from strop.engine.engine import Engine
from strop.formats.checkpoint import open_checkpoint
from strop.formats.tokenizer import Tokenizer
from strop.machine.memory import available_bytes
from strop.models import decoder
from strop.models.layout import Single
from strop.models.load import load
from strop.models.memory import XLA_RUNTIME_BYTES, weight_bytes
from strop.models.parameters import Parameters
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import ModelSpec
from strop.ops.attention import Rows

WINDOW_TOKENS = 512
NUM_WINDOWS = 9
"""4,590 scored positions."""
NUM_DECODE_WINDOWS = 2
"""Of them, those that are also scored one token at a time: 1,020 positions."""
MIN_TOKENS = 66
"""Two blocks of scored positions: fewer have no interval."""
_BLOCK_POSITIONS = 32
"""Neighbours share their context, so the bootstrap draws runs of them."""
_NUM_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and where 95 % of its bootstrap draws lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One engine's distance from the reference."""

    kl_nat: Interval
    perplexity_ratio: Interval
    top1_agreement: Interval
    num_positions: int
    is_bound: bool = False
    """The engine told only its most probable tokens, so the real KL may be higher."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """Per scored position [positions]."""

    kl: np.ndarray
    nll_difference: np.ndarray
    """Of the next token of the text: measured less reference."""
    agrees: np.ndarray


def english_text() -> str:
    """The built-in text: public-domain English prose."""
    return resources.files("strop.bench").joinpath("data/english.txt").read_text("utf-8")


def english_windows(tokenizer: Tokenizer) -> np.ndarray:
    """The built-in text's tokens, int32 [windows, WINDOW_TOKENS], each window framed as a text's beginning.

    Raises:
        RequestError: this tokenizer makes too few tokens of it.
    """
    ids = np.array(tokenizer.encode(english_text(), add_special=False), np.int32)
    windows = token_windows(ids, NUM_WINDOWS, prefix=tokenizer.encode(""))
    if len(windows) < NUM_DECODE_WINDOWS:
        raise RequestError(f"the fidelity text has too few tokens here; {WINDOW_TOKENS * 2} are needed")
    return windows


def token_windows(
    ids: np.ndarray, max_windows: int, window_tokens: int = WINDOW_TOKENS, prefix: Sequence[int] = ()
) -> np.ndarray:
    """The first tokens of a text, int32 [windows, window_tokens]; a shorter text makes one shorter window.

    Args:
        ids: int32 [tokens], without `prefix`.
        prefix: what every window begins with, such as the id that begins a text.

    Raises:
        RequestError: the text is too short to measure anything on.
    """
    body_tokens = min(window_tokens - len(prefix), len(ids))
    if body_tokens < MIN_TOKENS:
        raise RequestError(
            f"the text has {len(ids)} tokens of which a window takes {body_tokens}; at least {MIN_TOKENS} are needed:"
            " give a longer text or longer windows"
        )
    num_windows = min(max_windows, len(ids) // body_tokens)
    bodies = ids[: num_windows * body_tokens].reshape(num_windows, body_tokens)
    return np.concatenate([np.tile(np.array(prefix, np.int32), (num_windows, 1)), bodies], axis=1)


@partial(jax.jit, static_argnames=("spec",))
def _reference_logits(params: Parameters, tokens: jax.Array, spec: ModelSpec) -> jax.Array:
    """float32 [T, V] of tokens [T] at positions 0.."""
    num_rows = tokens.shape[0]
    places = jnp.arange(num_rows, dtype=jnp.int32)
    zeros = jnp.zeros_like(places)
    fields = jnp.stack([tokens, places, places, zeros, places + 1, zeros])
    rows = Rows(fields, jnp.zeros((1, 1), jnp.int32), jnp.full(2, num_rows, jnp.int32))
    layout = Single("xla")
    hidden, _ = decoder.forward(params, spec, rows, None, layout)
    return decoder.logits(params, spec, hidden, rows.counts, layout)


def _refuse_too_large(reader: ParameterReader) -> None:
    needed, available = weight_bytes(reader, "xla", 4) + XLA_RUNTIME_BYTES, available_bytes()
    if needed > available:
        raise CapacityError(
            f"{reader.checkpoint.path}: the float32 reference needs {needed / GIB:.1f} GiB and {available / GIB:.1f}"
            " are available: compare on a machine with more memory, or with a smaller model"
        )


def _on_disk(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a temporary file, as a large vocabulary makes gigabytes of it."""
    needed, free = 4 * math.prod(shape), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:  # else the system would kill the process when the disk is full
        raise CapacityError(
            f"the reference's logits need {needed / GIB:.1f} GiB in {tempfile.gettempdir()} and {free / GIB:.1f} are"
            " free: measure fewer windows, or set TMPDIR to a directory on a larger disk"
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


class Reference:
    """Float32 logits of windows, computed once and kept.

    Raises CapacityError when the dequantised weights do not fit the memory, or the logits the disk.
    """

    def __init__(self, model: str, windows: np.ndarray) -> None:
        checkpoint = open_checkpoint(model)
        spec = load_spec(checkpoint)
        reader = ParameterReader(checkpoint, spec)
        _refuse_too_large(reader)
        params = load(reader, spec, "xla", num_positions=windows.shape[1], source_hash=checkpoint.source_hash)
        self.windows = windows
        self.logits = _on_disk((*windows.shape, spec.vocab_size))
        for i, window in enumerate(windows):
            self.logits[i] = np.asarray(_reference_logits(params, jnp.asarray(window), spec))

    def compare(self, measured: Iterable[np.ndarray | TopLogprobs], first: int = 0) -> Fidelity:
        """Scores logits of consecutive windows from `first` on, but for positions without context or successor."""
        scores, is_bound = [], False
        for i, logits in enumerate(measured, first):
            if isinstance(logits, TopLogprobs):
                scores.append(_score_top(self.logits[i], logits, self.windows[i]))
                is_bound = True
            else:
                parts = _score(self.logits[i], logits, self.windows[i])
                scores.append(_Scores(*(np.asarray(part, np.float64) for part in parts)))
        kl = np.concatenate([score.kl for score in scores])
        difference = np.concatenate([score.nll_difference for score in scores])
        return Fidelity(
            _interval(kl),
            _exp(_interval(difference)),
            _interval(np.concatenate([score.agrees for score in scores])),
            len(kl),
            is_bound,
        )


class Likelihood:
    """Notes how probable the windows' tokens are while their logits pass by: the positions that `compare` scores.

    Raises StropError when a logit is not finite.
    """

    def __init__(self) -> None:
        self._nll: list[np.ndarray] = []

    def watch(self, logits: Iterable[np.ndarray], windows: np.ndarray) -> Iterator[np.ndarray]:
        """Passes on the logits [T, V] of each window."""
        for scores, window in zip(logits, windows, strict=True):
            self._nll.append(np.asarray(_nll(scores, window), np.float64))
            if not np.isfinite(self._nll[-1]).all():
                raise StropError(
                    f"window {len(self._nll)}: the model gives probabilities that are not numbers: its weights or its"
                    " config are damaged"
                )
            yield scores

    @property
    def perplexity(self) -> Interval:
        """exp of the mean negative log likelihood of what has passed."""
        return _exp(_interval(np.concatenate(self._nll)))


@jax.jit
def _nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """float32 [T - 2]."""
    following = tokens[2:]
    return -jax.nn.log_softmax(logits[1:-1])[jnp.arange(following.shape[0]), following]


def our_logits(engine: Engine, windows: np.ndarray, *, one_by_one: bool) -> Iterator[np.ndarray]:
    """The engine's own logits through its cache: as a prompt, or as if every token but the first were generated."""
    for window in windows:
        ids = [int(token) for token in window]
        yield np.concatenate(list(engine.score(ids, decode_from=1 if one_by_one else None)))


@jax.jit
def _score(reference: jax.Array, measured: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL, difference of negative log likelihoods, agreement: each [T - 2].

    With d the difference of logits less its mean under the reference, KL = log E[exp d]; E[d] = 0, so it is
    log1p(E[expm1(d) - d]), whose terms are all of the KL's own size: float32 is enough.
    """
    r, m, following = reference[1:-1], measured[1:-1], tokens[2:]
    log_p = jax.nn.log_softmax(r)
    p = jnp.exp(log_p)
    d = m - r
    d = d - (p * d).sum(-1, keepdims=True)
    kl = jnp.log1p((p * (jnp.expm1(d) - d)).sum(-1))
    at = (jnp.arange(following.shape[0]), following)
    return kl, log_p[at] - jax.nn.log_softmax(m)[at], r.argmax(-1) == m.argmax(-1)


def _score_top(reference: np.ndarray, measured: TopLogprobs, tokens: np.ndarray) -> _Scores:
    """A lower bound of the KL: all tokens the engine did not name count as one."""
    r = reference[1:-1].astype(np.float64)
    r -= r.max(-1, keepdims=True)
    log_p = r - np.log(np.exp(r).sum(-1, keepdims=True))
    ids, log_q = measured.token_ids[1:-1], measured.logprobs[1:-1].astype(np.float64)
    log_p_named = np.take_along_axis(log_p, ids, -1)
    p_named, q_named = np.exp(log_p_named), np.exp(log_q)
    p_rest = np.clip(1.0 - p_named.sum(-1), 1e-12, None)
    q_rest = np.clip(1.0 - q_named.sum(-1), 1e-12, None)
    kl = (p_named * (log_p_named - log_q)).sum(-1) + p_rest * np.log(p_rest / q_rest)
    following = tokens[2:, None]
    named = ids == following
    next_log_q = np.where(
        named.any(-1), np.where(named, log_q, 0.0).sum(-1), np.log(q_rest / (r.shape[-1] - ids.shape[-1]))
    )
    next_log_p = np.take_along_axis(log_p, following, -1)[:, 0]
    return _Scores(np.maximum(kl, 0.0), next_log_p - next_log_q, r.argmax(-1) == ids[:, 0])


def _exp(interval: Interval) -> Interval:
    # The exponential of more than 709 is no number, in float64 and in JSON.
    return Interval(*(float(np.exp(min(value, 700.0))) for value in (interval.mean, interval.low, interval.high)))


def _interval(values: np.ndarray) -> Interval:
    """Block bootstrap of the mean."""
    blocks = np.array([block.mean() for block in np.array_split(values, max(1, len(values) // _BLOCK_POSITIONS))])
    draws = np.random.default_rng(0).integers(0, len(blocks), (_NUM_DRAWS, len(blocks)))
    low, high = np.quantile(blocks[draws].mean(-1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
