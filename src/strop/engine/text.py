"""Prompts in, text out: what goes to the engine as token ids, and how its tokens become streamed text. No jax."""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from strop.core.errors import RequestError
from strop.core.request import Delta, SamplingParams, TokenEvent
from strop.formats.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages such as {"role": "user", "content": "Hello"}."""

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def prepare_prompt(
    tokenizer: Tokenizer, prompt: Prompt, *, vocab_size: int | None = None, **template: Any
) -> tuple[int, ...]:
    """The token ids the engine is to continue.

    Text is framed as the model expects and may name special tokens; token ids are taken as they are; messages go
    through the chat template, which `template` is for: see Tokenizer.apply_chat_template. `vocab_size` is the model's,
    where it exceeds the tokenizer's. Raises RequestError for an empty or malformed prompt and for ids out of range.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special=True)
    elif isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise RequestError(f"a prompt must be text, a list of token ids or a list of messages, not {_kind(prompt)}")
    elif prompt and all(isinstance(item, Mapping) for item in prompt):
        messages: list[Mapping[str, Any]] = [item for item in prompt if isinstance(item, Mapping)]
        for position, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise RequestError(f"message {position} has role={message.get('role')!r}; it must be text like 'user'")
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages, **template), add_special=False)
    else:
        ids = _checked_ids(prompt, tokenizer.vocab_size if vocab_size is None else vocab_size)
    if not ids:
        raise RequestError("the prompt is empty: it holds no tokens; send at least one")
    return tuple(ids)


def _checked_ids(prompt: Sequence[Any], vocab_size: int) -> list[int]:
    for position, token_id in enumerate(prompt):
        is_id = isinstance(token_id, (int, Integral))  # Integral: NumPy's too, but slowly
        if not is_id or isinstance(token_id, bool):
            raise RequestError(
                f"prompt item {position} is {_kind(token_id)}; token ids are integers, messages are maps"
            )
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} at prompt position {position} is out of range: 0 to {vocab_size - 1}"
            )
    return [int(token_id) for token_id in prompt]


def _kind(value: object) -> str:
    return type(value).__name__


class StreamDetokenizer:
    """Turns the token events of one request, all its choices, into text pieces, in constant time per character.

    For each choice the texts of its deltas add up to `tokenizer.decode(ids, skip_special_tokens, continuation=True)`,
    with these ends:
    - A stop string ends the answer before itself (after itself with `include_stop_str_in_output`), and tokens past the
      one that completes it are dropped. The one that is complete first counts; of several complete at the same
      character, the longest. Text of the first `min_tokens` tokens cannot be part of one.
    - A token that ended the answer (end of sequence, stop_token_ids) adds no text, unless `include_stop_str_in_output`.
    A UTF-8 character is never split, and no part of a stop string shows before it is known not to be one.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._skipped_ids = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._choices: dict[int, _Choice] = {}

    def push(self, event: TokenEvent) -> Delta | None:
        """The text that `event` makes certain (it may be ""), or None when its choice had already ended.

        If a stop string ends the choice, the delta says so, and the engine must be told: see `must_abort`.
        """
        choice = self._choices.setdefault(event.index, _Choice())
        if choice.ended:
            return None
        choice.ended = event.finish_reason is not None
        spellings = [self._spell(token_id) for token_id in event.token_ids]
        ended_by_token = not self._params.include_stop_str_in_output and self._ended_by_last_token(event)
        if ended_by_token:
            spellings[-1] = b""
        if not self._stops:
            text = choice.decoder.decode(b"".join(spellings), choice.ended)
            return _delta(event, text, ended_by_token=ended_by_token)
        pieces = []
        for num_used, spelling in enumerate(spellings, 1):
            choice.num_tokens += 1
            piece, stop = self._advance(choice, choice.decoder.decode(spelling), self._stops)
            pieces.append(piece)
            if stop is not None:
                return _delta(event, "".join(pieces), num_used, stop)
        if choice.ended:
            piece, stop = self._advance(choice, choice.decoder.decode(b"", True), self._stops)
            pieces += [piece, choice.held]
            if stop is not None:
                return _delta(event, "".join(pieces), len(spellings), stop)
        return _delta(event, "".join(pieces), ended_by_token=ended_by_token)

    def _spell(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped_ids else self._tokenizer.token_bytes(token_id)

    def _ended_by_last_token(self, event: TokenEvent) -> bool:
        if event.finish_reason != "stop" or not event.token_ids:
            return False
        last_id = event.token_ids[-1]
        return last_id in self._tokenizer.eos_ids if event.stop_reason is None else last_id == event.stop_reason

    def _advance(self, choice: "_Choice", text: str, stops: "StopMatcher") -> tuple[str, str | None]:
        """Text that is certain once `text` follows what is held, and the stop string that ended the choice."""
        if choice.num_tokens <= self._params.min_tokens:
            return text, None
        choice.node, num_read, stop_len = stops.scan(choice.node, text)
        text = choice.held + text[:num_read]
        cut = len(text) - (stop_len or stops.depth[choice.node])
        choice.held = text[cut:]
        if not stop_len:
            return text[:cut], None
        stop, choice.held, choice.ended = choice.held, "", True
        return (text if self._params.include_stop_str_in_output else text[:cut]), stop


def must_abort(event: TokenEvent, delta: Delta) -> bool:
    """Whether the text ended a choice that the engine, by its `event`, still goes on with."""
    return event.finish_reason is None and delta.finish_reason is not None


class StopMatcher:
    """Finds the first of several strings to be complete in a text that arrives in pieces (Aho & Corasick 1975).

    Nodes are the prefixes of the strings; a node stands for the longest one that the text so far ends with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        """Characters of the prefix at each node: so many at the text's end may belong to a stop string."""
        self._stop_len: list[int] = [0]
        for stop in stops:
            node = 0
            for character in stop:
                if character not in self._edges[node]:
                    self._edges[node][character] = len(self._edges)
                    self._edges.append({})
                    self.depth.append(self.depth[node] + 1)
                    self._stop_len.append(0)
                node = self._edges[node][character]
            self._stop_len[node] = len(stop)
        self._shorter = [0] * len(self._edges)
        """The longest proper suffix of each node that is a node too."""
        queue = deque(self._edges[0].values())
        while queue:
            node = queue.popleft()
            for character, longer in self._edges[node].items():
                self._shorter[longer] = self._step(self._shorter[node], character)
                queue.append(longer)
            # A whole prefix that is a stop string is longer than any that ends inside it.
            self._stop_len[node] = self._stop_len[node] or self._stop_len[self._shorter[node]]

    def scan(self, node: int, text: str) -> tuple[int, int, int]:
        """From `node` through `text` up to the first complete string.

        Returns (node, characters read, length of the complete string or 0).
        """
        for position, character in enumerate(text, 1):
            node = self._step(node, character)
            if self._stop_len[node]:
                return node, position, self._stop_len[node]
        return node, len(text), 0

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._edges[node]:
            node = self._shorter[node]
        return self._edges[node].get(character, 0)


@dataclass(slots=True)
class _Choice:
    """One answer on its way: undecoded bytes in `decoder`, text that may be part of a stop string in `held`."""

    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _Utf8Decoder("replace"))
    held: str = ""
    node: int = 0
    num_tokens: int = 0
    ended: bool = False


def _delta(
    event: TokenEvent, text: str, num_used: int | None = None, stop: str | None = None, *, ended_by_token: bool = False
) -> Delta:
    return Delta(
        event.request_id,
        event.index,
        text,
        event.token_ids[:num_used],
        event.logprobs[:num_used],
        event.finish_reason if stop is None else "stop",
        event.stop_reason if stop is None else stop,
        event.num_cached_tokens,
        event.prompt_logprobs,
        ended_by_token,
    )
