"""One HTTP request as the server drives it: what to ask the engine, and what to send for each delta that comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec import Struct

from strop.core.errors import StropError
from strop.core.request import Delta, SamplingParams
from strop.serve.openai.errors import ApiError, context_overflow, error_body
from strop.serve.openai.fields import Caps, shown
from strop.serve.openai.reasoning import ThinkTags
from strop.serve.tool_calls import ToolSupport

if TYPE_CHECKING:  # the tokenizer behind it is no business of this package
    from strop.engine.text import Prompt

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


class Vocabulary(Protocol):
    """What log probabilities and echoed prompts need of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """What one server offers to all requests."""

    names: tuple[str, ...]
    """By which requests may call the model; replies repeat the one that was used."""
    created_s: int
    """Unix time at which the model was loaded."""
    context_len: int
    """Tokens of prompt and answer together."""
    vocabulary: Vocabulary
    tools: ToolSupport
    chat_template: str = ""
    """The model's own: it says which roles and variables mean something to this model."""
    thinking: ThinkTags | None = None
    """How it marks what it thinks, if that is to be split from its answers."""
    embedding_len: int | None = None
    """Numbers of one vector; None if the model does not embed."""
    embeddings_may_be_cut: bool = False
    """Whether it was trained so that the first numbers of a vector are one too (Matryoshka)."""
    system_fingerprint: str | None = None
    caps: Caps = field(default_factory=Caps)

    def check_name(self, name: str) -> None:
        """Raises ApiError (404) unless the model goes by `name`."""
        if name not in self.names:
            raise ApiError(
                f"the model {shown(name)} does not exist here: this server has {', '.join(self.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def text_end(self, token_ids: Sequence[int]) -> str:
        """The last few words of a prompt."""
        return b"".join(map(self.vocabulary.token_bytes, token_ids[-16:])).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the engine, its n choices included."""

    prompt: "Prompt"
    template: dict[str, Any]
    """Keyword arguments of Tokenizer.apply_chat_template, where the prompt is messages."""
    params: SamplingParams


class Exchange(Protocol):
    """The translation of one HTTP request and its reply. All methods raise ApiError for what the request has wrong."""

    @property
    def asked(self) -> tuple[Asked, ...]:
        """What the engine is to do."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the client wants frames as the answer grows."""
        ...

    def begin(self, which: int, prompt_token_ids: tuple[int, ...]) -> SamplingParams:
        """When `asked[which]` is tokenised. Returns its parameters, with a shape that suits how the prompt ends.

        Raises ApiError (context_length_exceeded) if prompt and answer do not fit the context.
        """
        ...

    def push(self, which: int, delta: Delta) -> bytes:
        """The frames for a delta of `asked[which]`; b"" without `stream`, and it is kept."""
        ...

    def end(self) -> bytes:
        """After the last delta: the frames that close a stream, or the whole body."""
        ...

    def fail(self, error: StropError) -> bytes:
        """The frames that tell of an error after a stream has begun; it ends with them."""
        ...


class PromptTokensDetails(Struct):
    """Where a prompt's tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(Struct):
    """What an answer's tokens were."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Struct):
    """The tokens of a request; a prompt counts once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Tally:
    """Counts the tokens of one HTTP request."""

    def __init__(self, num_asked: int) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._cached_tokens = [0] * num_asked

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(self._cached_tokens)

    def add(self, which: int, delta: Delta, is_reasoning: bool = False) -> None:
        """Count the tokens of a delta of `asked[which]`."""
        self.completion_tokens += len(delta.token_ids)
        self.reasoning_tokens += len(delta.token_ids) if is_reasoning else 0
        self._cached_tokens[which] = delta.num_cached_tokens

    def usage(self) -> Usage:
        """The sums so far."""
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            PromptTokensDetails(self.cached_tokens),
            CompletionTokensDetails(self.reasoning_tokens),
        )


def error_frame(error: StropError) -> bytes:
    """The frame at which clients raise `error`."""
    return b"data: %b\n\n" % error_body(error)


def check_context(num_prompt_tokens: int, params: SamplingParams, context_len: int, param: str) -> None:
    """Raises ApiError if the answer asked for has no room behind its prompt; `param` is the prompt's field."""
    if num_prompt_tokens + (params.max_tokens or 1) > context_len:
        raise context_overflow(num_prompt_tokens, params.max_tokens, context_len, param)
