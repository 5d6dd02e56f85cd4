"""A vocabulary for grammars, and whether a matcher accepts a text, token by token, by its masks alone."""

from functools import cache

import numpy as np
from tiny_tokenizer import tiny_metadata

from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import Grammar, Grammars, Matcher
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.tokenizer import Tokenizer

VOCAB_SIZE = 300
"""The model's: more than the tokenizer's 268."""
END_ID = 1


@cache
def tokenizer() -> Tokenizer:
    return tokenizer_from_gguf(tiny_metadata())


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), VOCAB_SIZE, num_threads=2)


def compiled(**wanted: object) -> Grammar:
    return grammars().compile(StructuredOutputsParams(**wanted))


def allowed_ids(matcher: Matcher) -> set[int]:
    words = grammars().masks([matcher], 1)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a new answer can be `text` and end there: each token allowed by its mask, and then the end."""
    matcher = grammar.matcher()
    for token_id in tokenizer().encode(text, False, allow_special=False):
        if matcher.is_complete or token_id not in allowed_ids(matcher):
            return False
        matcher.advance(token_id)
    return matcher.is_complete or END_ID in allowed_ids(matcher)
