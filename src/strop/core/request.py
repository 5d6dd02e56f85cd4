"""What a user asks and what comes back. Plain data; the field names are those vLLM users know."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from json import dumps
from numbers import Integral, Real
from typing import Any, Literal

from strop.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20
MAX_N = 128


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What shape the answer must have: exactly one of these."""

    json: str | dict[str, Any] | bool | None = None
    """A JSON schema (draft 2020-12), as a value or as JSON text. Kept as text. Properties come in its order, with at
    most a space after commas and colons. True: any JSON."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """In ECMA-262's notation, without lookaround; the whole answer matches it."""
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """In the Lark notation of llguidance."""

    def __post_init__(self) -> None:
        """Raises RequestError for a value of the wrong type and unless exactly one is given; parses nothing."""
        if isinstance(self.json, dict | bool):
            object.__setattr__(self, "json", dumps(self.json))
        for name in ("json", "regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong_type(name, getattr(self, name), "text" if name != "json" else "a JSON schema")
        if not isinstance(self.json_object, bool):
            raise _wrong_type("json_object", self.json_object, "True or False")
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts("choice", self.choice))
        given = [name for name in _SHAPES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(f"structured_outputs has {' and '.join(given) or 'nothing'}: give one of {_SHAPES}")

    @property
    def schema(self) -> str | None:
        """The JSON schema, as text, that the answer follows; None for a shape that is not JSON."""
        return '{"type": "object"}' if self.json_object else str(self.json) if self.json is not None else None


_SHAPES = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. `temperature=0` is greedy; a sampled answer depends only on `seed` and the prompt."""

    n: int = 1
    max_tokens: int | None = 16
    """Tokens to generate at most; None means up to the context's end."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids are masked until this many tokens exist."""
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Keep tokens whose probability is at least min_p times the largest one."""
    seed: int | None = None
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens seen in prompt or answer (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Subtracted from the logits of generated tokens: once, and per occurrence (OpenAI API)."""
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    """Report the chosen token's log probability and those of this many most probable tokens (raw, before penalties)."""
    prompt_logprobs: int | None = None
    """The same of the prompt's own tokens but the first, each after those before it; nothing is taken from the prefix
    cache then."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for a value of the wrong type or out of range. Numbers become plain `int` and `float`."""
        for name, (kind, is_accepted, accepted) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                value = _number(name, value, kind, accepted)
                if not is_accepted(value):
                    raise RequestError(f"{name}={_shown(value)} is out of range: give {accepted}")
                object.__setattr__(self, name, value)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong_type(name, getattr(self, name), "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is out of range: give at most max_tokens={self.max_tokens}"
            )
        object.__setattr__(self, "stop", () if self.stop is None else _texts("stop", self.stop))
        shape = self.structured_outputs
        if shape is not None and not isinstance(shape, StructuredOutputsParams):
            raise _wrong_type("structured_outputs", shape, "a StructuredOutputsParams")
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already tokenised, and how to answer it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: bytes = b""
    """Requests share cached prefixes only with those of the same salt."""

    def __post_init__(self) -> None:
        """Raises RequestError for a value of the wrong type; whether the model has these ids is the engine's to say."""
        if not isinstance(self.request_id, str):
            raise _wrong_type("request_id", self.request_id, "text")
        if not isinstance(self.params, SamplingParams):
            raise _wrong_type("params", self.params, "a SamplingParams")
        if not isinstance(self.cache_salt, bytes):
            raise _wrong_type("cache_salt", self.cache_salt, "bytes")
        object.__setattr__(self, "prompt_token_ids", _token_ids("prompt_token_ids", self.prompt_token_ids))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of the token at one generated position, and of the most probable ones there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token_id, logprob), most probable first."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step produced for one choice of a request: ids only, before detokenising."""

    request_id: str
    index: int
    """Which of the n choices."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on; comes once, with the first event."""
    fault: Literal["request", "engine"] | None = None
    """Of an abort that nobody asked for: whose it is. `stop_reason` then says in words what happened."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of answer text for one choice. The concatenation of a choice's texts is its final text, exactly."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ended_by_token: bool = False
    """The last token only ended the answer: it is no part of the text. A grammar may end one without such a token."""


@dataclass(slots=True)
class CompletionOutput:
    """One finished choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All choices of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One per prompt token, None for the first, if they were asked for."""


@dataclass(slots=True)
class EmbeddingOutput:
    """A text's vector."""

    embedding: list[float]
    """[D]."""


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What became of one text."""

    request_id: str
    """The text's position, as text."""
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cut_tokens: int = 0
    """Tokens of the text that the model's limit left no room for."""


_INT64_MAX = 2**63 - 1
_LARGEST = 1e30  # stays finite in float32, after any arithmetic the sampler does

_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
# Comparisons are false for NaN.
_NUMBERS: dict[str, tuple[type[int] | type[float], Callable[[Any], bool], str]] = {
    "n": (int, lambda n: 1 <= n <= MAX_N, f"an integer from 1 to {MAX_N}"),
    "max_tokens": (int, lambda n: 1 <= n <= _INT64_MAX, "an integer, 1 or more, or None for no limit"),
    "min_tokens": (int, lambda n: 0 <= n <= _INT64_MAX, "an integer, 0 or more"),
    "temperature": (float, lambda x: 0 <= x < _LARGEST, "a finite number, 0 or more"),
    "top_k": (int, lambda n: 0 <= n <= _INT64_MAX, "an integer, 0 (keep all) or more"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "seed": (int, lambda n: -(2**63) <= n < 2**64, "an integer of at most 64 bits, or None"),
    "repetition_penalty": (float, lambda x: 0 < x < _LARGEST, "a finite number above 0"),
    "presence_penalty": (float, lambda x: abs(x) < _LARGEST, "a finite number"),
    "frequency_penalty": (float, lambda x: abs(x) < _LARGEST, "a finite number"),
    "logprobs": (int, lambda n: 0 <= n <= MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}, or None"),
    "prompt_logprobs": (int, lambda n: 0 <= n <= MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}, or None"),
}


def _number(name: str, value: Any, kind: type[int] | type[float], accepted: str) -> int | float:
    """`value` as a plain int or float; NumPy's scalars are numbers too, booleans are not."""
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number:
        raise _wrong_type(name, value, accepted)
    try:
        return kind(value)
    except OverflowError:
        raise RequestError(f"{name}={_shown(value)} is out of range: give {accepted}") from None


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _wrong_type(name, value, "a list of token ids")
    ids = tuple(value)
    if set(map(type, ids)) <= {int}:  # prompts are long
        return ids
    return tuple(int(_number(f"{name}[{i}]", item, int, "a token id, an integer")) for i, item in enumerate(ids))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    accepted = "a text, or a list of texts, none of them empty"
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise _wrong_type(name, value, accepted)
    texts = tuple(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise _wrong_type(f"{name}[{i}]", text, accepted)
        if not text:
            raise RequestError(f"{name}[{i}]='' is out of range: give {accepted}")
    return texts


def _biases(value: Any) -> dict[int, float]:
    accepted = "a map from token ids (integers) to finite numbers"
    if not isinstance(value, Mapping):
        raise _wrong_type("logit_bias", value, accepted)
    biases = {}
    for token_id, bias in value.items():
        token_id = int(_number("logit_bias key", token_id, int, accepted))
        biases[token_id] = float(_number(f"logit_bias[{_shown(token_id)}]", bias, float, accepted))
        if not abs(biases[token_id]) < _LARGEST:
            raise RequestError(f"logit_bias[{_shown(token_id)}]={_shown(bias)} is out of range: give {accepted}")
    return biases


def _wrong_type(name: str, value: object, accepted: str) -> RequestError:
    return RequestError(f"{name}={_shown(value)} has type {type(value).__name__}: give {accepted}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python spells no integer of thousands of digits
        return "..."
    return text if len(text) <= 80 else f"{text[:77]}..."
