"""Prompts of a wanted number of tokens, sized by what the server can tell."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from itertools import islice
from typing import Protocol

from strop.core.errors import RequestError

Prompt = str | list[int]

_SPAN_WORDS = 12
"""Words in a row from the text: prompts are real language, and two share less than a block of a prefix cache."""
_FILLER = "the"
"""One token in the vocabularies we know."""
_TOKENS_PER_WORD = 1.3
_MAX_TRIES = 12
_TOKEN_IDS = range(256, 4096)
"""Ordinary tokens in the vocabularies we know."""


def text_words(seed: str) -> Iterator[str]:
    """Endless English of our own: short runs of words from all over a text. Each seed has its own."""
    words = resources.files("strop.bench").joinpath("data", "english.txt").read_text("utf-8").split()
    rng = random.Random(seed)
    while True:
        begin = rng.randrange(len(words) - _SPAN_WORDS)
        yield from words[begin : begin + _SPAN_WORDS]


class PromptMaker(Protocol):
    """Makes prompts for one server."""

    @property
    def method(self) -> str:
        """How their length is found, for the report."""
        ...

    async def make(self, num_tokens: int, num_shared: int, seed: str) -> Prompt:
        """A prompt of `num_tokens`, whose first `num_shared` are the same for all seeds."""
        ...


class CountedText:
    """Text whose tokens the server counts before it is sent."""

    method = "English text, counted by the server's /tokenize"

    def __init__(self, count: Callable[[str], Awaitable[int]], num_extra: int) -> None:
        """`num_extra` tokens are put around every text (a chat template, a token at the beginning)."""
        self._count, self._num_extra = count, num_extra
        self._tokens_per_word = _TOKENS_PER_WORD
        self._shared: dict[int, asyncio.Task[list[str]]] = {}

    async def make(self, num_tokens: int, num_shared: int, seed: str) -> str:
        """See PromptMaker. The nearest length, where no text has the wanted one. RequestError if there is no room."""
        goal = num_tokens - self._num_extra
        if goal <= num_shared:
            raise RequestError(
                f"a prompt of {num_tokens} tokens has no room: {num_shared} are shared and the server adds "
                f"{self._num_extra} of its own: ask for more than {num_shared + self._num_extra}"
            )
        if num_shared and num_shared not in self._shared:  # whoever asks meanwhile waits for the same words
            self._shared[num_shared] = asyncio.create_task(self._sized([], num_shared, text_words("shared")))
        head = await self._shared[num_shared] if num_shared else []
        return " ".join(await self._sized(head, goal, text_words(seed)))

    async def _sized(self, head: list[str], goal: int, words: Iterator[str]) -> list[str]:
        """`head` and some of `words`, `goal` tokens in all."""
        num_words = max(len(head) + 1, int(goal / self._tokens_per_word))
        best = chosen = head + list(islice(words, num_words - len(head)))
        best_miss = float("inf")
        for _ in range(_MAX_TRIES):
            count = await self._count(" ".join(chosen))
            missing = goal - count
            if abs(missing) < best_miss:
                best, best_miss = chosen, abs(missing)
                self._tokens_per_word = max(count / len(chosen), 0.1)
            if missing == 0:
                break
            num_words = max(1, int(abs(missing) / self._tokens_per_word))
            if missing > 4:
                chosen = chosen + list(islice(words, num_words))
            elif missing > 0:
                chosen = chosen + [_FILLER] * missing
            else:
                chosen = chosen[: max(len(head), len(chosen) - num_words)] or [_FILLER]
        return best


class TokenIds:
    """Random token ids, for servers that take them and tokenise for nobody."""

    method = "random token ids (the server has no /tokenize)"

    async def make(self, num_tokens: int, num_shared: int, seed: str) -> list[int]:
        """See PromptMaker."""
        shared = random.Random("shared").choices(_TOKEN_IDS, k=num_shared)
        return shared + random.Random(seed).choices(_TOKEN_IDS, k=num_tokens - num_shared)


class CountedWords:
    """Text of as many words as give about the wanted number of tokens."""

    def __init__(self, tokens_per_word: float | None, num_extra: float) -> None:
        """As the server's usage shows them; None if it shows none."""
        self._tokens_per_word, self._num_extra = tokens_per_word or _TOKENS_PER_WORD, num_extra
        source = "from the server's usage" if tokens_per_word else "a guess"
        self.method = f"English text, {self._tokens_per_word:.2f} tokens a word ({source})"

    async def make(self, num_tokens: int, num_shared: int, seed: str) -> str:
        """See PromptMaker."""
        num_words = max(1, round((num_tokens - self._num_extra) / self._tokens_per_word))
        num_shared_words = min(num_words - 1, round(num_shared / self._tokens_per_word))
        words, shared = text_words(seed), text_words("shared")
        return " ".join(next(shared if i < num_shared_words else words) for i in range(num_words))
