"""What a user asks and what comes back. Plain data; the field names are those vLLM users know."""

from dataclasses import dataclass, field
from typing import Literal

from strop.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20
MAX_N = 128


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
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))

        def require(ok: bool, name: str, accepted: str) -> None:
            if not ok:
                raise RequestError(f"{name}={getattr(self, name)!r} is out of range: {accepted}")

        def finite(name: str) -> bool:
            return abs(float(getattr(self, name))) < 1e30  # also false for NaN

        require(isinstance(self.n, int) and 1 <= self.n <= MAX_N, "n", f"an integer from 1 to {MAX_N}")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1, or None for no limit")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "not more than max_tokens")
        require(finite("temperature") and self.temperature >= 0, "temperature", "a finite number, 0 or more")
        require(self.top_k >= 0, "top_k", "0 (keep all) or more")
        require(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        require(
            finite("repetition_penalty") and self.repetition_penalty > 0, "repetition_penalty", "finite and above 0"
        )
        require(finite("presence_penalty"), "presence_penalty", "a finite number")
        require(finite("frequency_penalty"), "frequency_penalty", "a finite number")
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"from 0 to {MAX_LOGPROBS}, or None",
        )
        require(all(s for s in self.stop), "stop", "non-empty strings")
        require(
            all(abs(float(bias)) < 1e30 for bias in (self.logit_bias or {}).values()), "logit_bias", "finite biases"
        )

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
