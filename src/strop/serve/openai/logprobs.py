"""Log probabilities as chat replies, text completions and responses spell them."""

import codecs
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct, field

from strop.core.request import Delta, TokenLogprob
from strop.serve.openai.exchange import Vocabulary

_LOWEST = -9999.0  # JSON has no infinity


class TopLogprob(Struct):
    """One of the most probable tokens at a position."""

    token: str
    bytes: tuple[int, ...]
    logprob: float


class ContentLogprob(Struct):
    """The token at a position. One that is no whole text by itself is spelled `bytes:\\xf0\\x9f`."""

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct):
    """Of a chat choice."""

    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """Of a text completion: one entry per token in each list; null for a prompt's first token, which follows none."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: Annotated[list[int], Meta(description="characters before the token")] = field(default_factory=list)

    def extend(self, more: "CompletionLogprobs") -> None:
        """Append the entries of the tokens that follow."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


def reported(delta: Delta) -> Sequence[TokenLogprob]:
    """The log probabilities of a delta's text: without the token that only ended it."""
    return delta.logprobs[:-1] if delta.ended_by_token else delta.logprobs


def content_logprobs(logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary) -> list[ContentLogprob]:
    """As chat and responses give them."""
    content = []
    for entry in logprobs:
        data = vocabulary.token_bytes(entry.token_id)
        top = []
        for token_id, logprob in entry.top:
            other = vocabulary.token_bytes(token_id)
            top.append(TopLogprob(_spelled(other), tuple(other), _finite(logprob)))
        content.append(ContentLogprob(_spelled(data), tuple(data), _finite(entry.logprob), top))
    return content


class CompletionSpeller:
    """Spells the log probabilities of one text completion, delta by delta."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def spell_prompt(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The entries of a prompt's tokens; `logprobs` are of those from the second on."""
        framed = b"".join(map(self._vocabulary.token_bytes, token_ids)).decode("utf-8", "replace")
        self._offset = -max(framed.find(text), 0)  # a token that only frames the text is no part of it
        spelled = CompletionLogprobs()
        self._append(spelled, token_ids[0], None, None)
        spelled.extend(self.spell(logprobs))
        return spelled

    def spell(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The entries of the next tokens; each token is among the most probable ones of its position."""
        spelled = CompletionLogprobs()
        for entry in logprobs:
            top = {_spelled(self._vocabulary.token_bytes(i)): _finite(value) for i, value in entry.top}
            self._append(spelled, entry.token_id, _finite(entry.logprob), top)
        return spelled

    def _append(
        self, spelled: CompletionLogprobs, token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        data = self._vocabulary.token_bytes(token_id)
        token = _spelled(data)
        if top is not None and logprob is not None:
            top[token] = logprob
        spelled.tokens.append(token)
        spelled.token_logprobs.append(logprob)
        spelled.top_logprobs.append(top)
        spelled.text_offset.append(max(self._offset, 0))
        self._offset += len(self._decoder.decode(data))


def _spelled(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # also for NaN
