"""Ending answers in time: what to write when few tokens are left, so that an answer is whole, not cut off. No jax."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import llguidance
import numpy as np

_IN_STRING = ('"', '1"', '1.0.0"', 'http://a.com"', 'a@a.com"', '2020-01-01"', '2020-01-01T00:00:00Z"')
# Tried in this order: first what closes, then what leads on, then values, the short ones first.
_CLOSING = ("}", "]", ",", ":", '""', *"0123456789", "null", "[]", "{}", "true", "false")
_OPENING = ('"', "-", "[", "{")
_MARKS = (b":", b"/", b"@", b".", b"-")
_MAX_NAMES = 1000
_MAX_FREE = 50
"""Tokens written without seeing an end of them."""
_MAX_TRIES, _FREE_TRIES = 4000, 50
"""For one way: some 5 ms. A free token costs as much as so many tries. No clock: it would change answers."""
_MAX_TRIES_OF_ANSWER = 50 * _MAX_TRIES
_MAX_SPARED = 3
"""Tokens of a known way that one other token may stand for."""
_SPARE_TOKENS = 64
"""What one token can begin may take long to end: with less than this to spare, every token is looked at."""

Tokens = list[int]


class Quotes(NamedTuple):
    """Whether JSON text stops inside a string."""

    is_open: bool = False
    escapes: bool = False

    def after(self, text: bytes) -> "Quotes":
        """Where more text leads."""
        if not self.escapes and b'"' not in text and b"\\" not in text:
            return self
        is_open, escapes = self
        for byte in text:
            if escapes:
                escapes = False
            elif byte == ord("\\"):
                escapes = is_open
            elif byte == ord('"'):
                is_open = not is_open
        return Quotes(is_open, escapes)


class Endings:
    """Finds tokens that complete an answer: few, though not always the fewest.

    It closes what JSON has open as soon as the grammar lets it; until then it writes short values and required names.
    In other languages it writes what must come. Where there is a choice among letters it takes long words, and if that
    leads nowhere it looks for marks that begin another part, as in an address.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, spellings: list[bytes], special_ids: Iterable[int]) -> None:
        """`spellings`: each token's bytes."""
        self.spellings = spellings
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_tokens[:1]
        words = np.array([len(spelling) * (99 if spelling.isalpha() else 1) for spelling in spellings], np.int32)
        words[list(special_ids)] = 0
        marks = np.array([10**6 - _MARKS.index(text) if text in _MARKS else 0 for text in spellings], np.int32)
        self._tastes = words, np.maximum(words, marks)
        self.in_string, self.closing, self.opening = map(self._spelled, (_IN_STRING, _CLOSING, _OPENING))

    def names(self, schema: Any) -> list[Tokens]:
        """The required properties of a JSON schema, and of the schemas in it, as `find` takes them."""
        names = islice(dict.fromkeys(_required(schema)), _MAX_NAMES)
        return self._spelled(json.dumps(name, ensure_ascii=False) for name in names)

    def find(
        self, matcher: llguidance.LLMatcher, text: Quotes, names: list[Tokens], num_left: int
    ) -> tuple[Tokens | None, int]:
        """At most num_left tokens that complete the answer after `text`, None if it sees none; and how long it took."""
        num_tries = 0
        for taste in self._tastes:
            search = _Search(self, matcher.deep_copy(), text, names, taste)
            way = search.run(num_left)
            num_tries += search.num_tries
            if way is not None:
                return way, num_tries
        return None, num_tries

    def completes(self, matcher: llguidance.LLMatcher, token_ids: Tokens) -> bool:
        """Whether these tokens complete the answer: only if it may end after them is nothing open."""
        return bool(self.end) and matcher.validate_tokens(token_ids + self.end) == len(token_ids) + 1

    def _spelled(self, texts: Iterable[str]) -> list[Tokens]:
        return [self.tokenizer.greedy_tokenize(text) for text in texts]


class _Search:
    """One try to complete an answer."""

    def __init__(
        self, endings: Endings, matcher: llguidance.LLMatcher, text: Quotes, names: list[Tokens], taste: np.ndarray
    ) -> None:
        """Uses up the matcher. `taste` is for each token: the most tasteful one is taken where there is a choice."""
        self._endings, self._matcher, self._text = endings, matcher, text
        self._names, self._taste = names, taste
        self.num_tries = 0

    def run(self, num_left: int) -> Tokens | None:
        """At most num_left tokens; None if they do not suffice, or it takes too long."""
        found: Tokens = []
        num_free = 0
        while not self._matcher.is_accepting():
            step = self._step()
            num_free = 0 if step else num_free + 1
            step = step or self._free()
            found += step
            if not step or len(found) > num_left or num_free > _MAX_FREE or self.num_tries > _MAX_TRIES:
                return None
            if not self._matcher.consume_tokens(step):
                return None
            self._text = self._text.after(b"".join(self._endings.spellings[token_id] for token_id in step))
        return None if self._matcher.is_error() else found

    def _step(self) -> Tokens:
        """The next few tokens, if it is plain which they should be."""
        endings, validate = self._endings, self._matcher.validate_tokens
        forced = endings.tokenizer.greedy_tokenize(self._matcher.compute_ff_bytes().decode(errors="ignore"))
        if forced and validate(forced) == len(forced):
            return forced
        in_string = self._text.is_open
        for steps in (endings.in_string,) if in_string else (endings.closing, self._names, endings.opening):
            for step in steps:
                self.num_tries += 1
                if validate(step) == len(step):
                    return step
        return []

    def _free(self) -> Tokens:
        """The allowed token of the best taste, if there is one."""
        self.num_tries += _FREE_TRIES
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        tastes = self._taste * allowed[: len(self._taste)]
        best = int(tastes.argmax())
        return [best] if tastes[best] > 0 else []


class Ending:
    """Keeps one answer able to end in time: knows a way to do so, and leads it there once no token can be spared."""

    def __init__(self, endings: Endings, names: list[Tokens]) -> None:
        self._endings, self._names = endings, names
        self._text = Quotes()
        self._tries_left = _MAX_TRIES_OF_ANSWER
        self._way: Tokens | None = None
        """Completes the answer from where it is, in the tokens that are left; None if not known."""
        self._look_from: float = float("inf")
        """With so many tokens left, or fewer, a way must be known, and is looked for."""
        self.forced_id: int | None = None
        """The only token that may come next, once the way is as long as what is left."""

    def take(self, matcher: llguidance.LLMatcher, token_id: int, num_left: int) -> int:
        """Consumes and returns the answer's next token, after which num_left may follow.

        If with this one it could no longer end in time, as far as is known, it is another token, which leads there.
        """
        known = self._rest_after(matcher, token_id, num_left)
        if known is None:
            token_id = self._take_elsewhere(matcher, token_id, num_left)
        else:
            matcher.consume_token(token_id)
            self._way = known
        self._text = self._text.after(self._endings.spellings[token_id])
        self.forced_id = self._way[0] if self._way and len(self._way) == num_left else None
        return token_id

    def _rest_after(self, matcher: llguidance.LLMatcher, token_id: int, num_left: int) -> Tokens | None:
        """What of the known way completes the answer after this token: all of it inside a string, say."""
        way = self._way
        if way is None:
            return None
        if way[:1] == [token_id]:
            return way[1:]
        rests = (way[num_spared:] for num_spared in range(_MAX_SPARED + 1))
        return next(
            (rest for rest in rests if len(rest) <= num_left and self._endings.completes(matcher, [token_id, *rest])),
            None,
        )

    def _take_elsewhere(self, matcher: llguidance.LLMatcher, token_id: int, num_left: int) -> int:
        """The same for a token off the known way."""
        matcher.consume_token(token_id)
        former, self._way = self._way, None
        if matcher.is_stopped() or num_left > self._look_from:
            return token_id
        if self._tries_left > 0:
            text = self._text.after(self._endings.spellings[token_id])
            self._way, num_tries = self._endings.find(matcher, text, self._names, num_left)
            self._tries_left -= num_tries
        instead = self._endings.end if former == [] else former
        if self._way is None and instead:
            matcher.rollback(1)
            token_id, *self._way = instead
            matcher.consume_token(token_id)
        if self._way is None:
            self._look_from = num_left // 2
        else:
            spare = num_left - len(self._way) * 3 // 2 - _SPARE_TOKENS
            self._look_from = num_left - max(0, spare // 2)
        return token_id


def _required(schema: Any) -> Iterator[str]:
    """Names in all lists called `required`, wherever they are."""
    pending = [schema]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict):
            names = inner.get("required")
            yield from (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
            pending += inner.values()
        elif isinstance(inner, list):
            pending += inner
