"""SentencePiece vocabularies (BPE by score, and unigram) as backends of the `tokenizers` library.

The ids are llama.cpp's: text is one word, a space is written `▁`, and pieces between special tokens are apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from strop.core.errors import FormatError

# Token types, the same in GGUF and in SentencePiece's own files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_SPLITS_PER_TOKEN = 16
"""Mean number of ways to split a token in two; real vocabularies have 2. More would take memory without bound."""
_FREE_SPLITS = 1 << 18
_HASH_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary by id: texts (all different), types and scores."""

    texts: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    unknown_id: int | None

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.types) == len(self.scores):
            raise FormatError(
                f"{len(self.texts)} tokens have {len(self.types)} types and {len(self.scores)} scores;"
                " fetch the file again"
            )


def score_bpe(
    pieces: Pieces, *, adds_space_prefix: bool, strips_after: frozenset[str] = frozenset()
) -> tuple[tokenizers.Tokenizer, dict[int, tuple[int, ...]]]:
    """SentencePiece's BPE: of all neighbours that join to a token, the pair with the best score joins first.

    Returns the backend and what its stand-in ids (from len(pieces.texts) on) spell: characters that have no token of
    their own, yet tokens are made of them. Control and byte tokens are never made by joining: their names in a text
    stay text. Pairs with equal scores go by id, and splits of one token by the longer left part.

    Args:
        strips_after: the special tokens that swallow the spaces after them.
    """
    ids = {text: token_id for token_id, text in enumerate(pieces.texts)}
    plain_ids = [i for i, kind in enumerate(pieces.types) if kind in (NORMAL, UNUSED)]
    plain = [pieces.texts[i] for i in plain_ids]
    letters = sorted(set().union(*plain) - ids.keys())
    stand_ins = {len(ids) + i: _byte_ids(ids, letter, pieces.unknown_id) for i, letter in enumerate(letters)}
    scores = np.asarray(pieces.scores, np.float32)[plain_ids]
    if np.isnan(scores).any():
        raise FormatError("the tokens' scores hold a NaN; fetch the file again")
    merges = _merges(plain, letters, scores)
    ids |= {letter: len(ids) + i for i, letter in enumerate(letters)}
    unknown = None if pieces.unknown_id is None else pieces.texts[pieces.unknown_id]
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, byte_fallback=True))
    escape = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if adds_space_prefix else escape
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    add_special_tokens(backend, pieces, len(ids), strips_after)
    return backend, stand_ins


def unigram(
    pieces: Pieces, *, adds_space_prefix: bool, merges_spaces: bool, character_map: bytes = b""
) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model: the segmentation with the highest sum of scores; what no token spells is unknown.

    Args:
        merges_spaces: runs of spaces count as one, and a text begins with one and ends without.
        character_map: SentencePiece's compiled normalization, b"" for none.
    """
    scored = [
        (text, float(score) if kind == NORMAL else 0.0)
        for text, kind, score in zip(pieces.texts, pieces.types, pieces.scores, strict=True)
    ]
    backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=pieces.unknown_id, byte_fallback=False))
    steps: list[Any] = [normalizers.Precompiled(character_map)] if character_map else []
    if merges_spaces:
        steps += [normalizers.Replace(Regex(r"^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if merges_spaces or adds_space_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace(prepend_scheme="always" if adds_space_prefix else "never")
    add_special_tokens(backend, pieces, len(scored))
    return backend


def add_special_tokens(
    backend: tokenizers.Tokenizer, pieces: Pieces, num_ids: int, strips_after: frozenset[str] = frozenset()
) -> None:
    """Makes the pieces that are never plain text tokens of their own. FormatError if that changes any id."""
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind != USER_DEFINED, rstrip=text in strips_after)
            for text, kind in zip(pieces.texts, pieces.types, strict=True)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    if backend.get_vocab_size() != num_ids:
        raise FormatError("the tokens and their types disagree; fetch the file again")


def _byte_ids(ids: Mapping[str, int], text: str, unknown_id: int | None) -> tuple[int, ...]:
    byte_ids = [ids.get(f"<0x{byte:02X}>") for byte in text.encode()]
    known = tuple(token_id for token_id in byte_ids if token_id is not None)
    if len(known) == len(byte_ids):
        return known
    return () if unknown_id is None else (unknown_id,)


def _merges(texts: list[str], letters: list[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every split of a text into two known ones, best score first. FormatError past MAX_SPLITS_PER_TOKEN."""
    if not texts:
        return []
    known = [*texts, *letters]
    text_of, left, right, left_len = _splits(known, len(texts))
    if len(text_of) > MAX_SPLITS_PER_TOKEN * len(texts) + _FREE_SPLITS:
        raise FormatError(
            f"the {len(texts)} tokens split into each other in {len(text_of)} ways, more than {MAX_SPLITS_PER_TOKEN}"
            " for each; no real vocabulary does: fetch the file again"
        )
    rank = np.empty(len(texts), np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(texts))
    order = np.argsort(rank[text_of] * (int(left_len.max(initial=0)) + 1) - left_len)
    halves = (map(known.__getitem__, part[order].tolist()) for part in (left, right))
    return list(zip(*halves, strict=True))


def _splits(texts: list[str], num_split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(text_of, left, right, left_len): which of the first `num_split` texts is which other two, one after the other.

    A hash is polynomial modulo 2**64, so that of any part follows from the running sums: a quarter of a million texts
    take a third of a second, where looking up each half in a dictionary takes two. Texts made to collide give halves
    that the library refuses, since their joint text is no token.
    """
    lens = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64)
    starts = np.cumsum(lens) - lens
    text_of = np.repeat(np.arange(len(texts)), lens)
    place = np.arange(len(codes)) - starts[text_of]
    powers = np.cumprod(np.full(int(lens.max()) + 1, _HASH_BASE, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes + np.uint64(1)) * powers[place])])
    table = _HashTable(sums[starts + lens] - sums[starts])
    cuts = np.flatnonzero((place > 0) & (text_of < num_split))
    left = table.find(sums[cuts] - sums[starts[text_of[cuts]]])
    cuts, left = cuts[left >= 0], left[left >= 0]
    # The right half's sum carries the factor base**left_len; its inverse modulo 2**64 takes that out.
    inverses = np.cumprod(np.full(len(powers), pow(_HASH_BASE, -1, 1 << 64), np.uint64))
    right = table.find((sums[(starts + lens)[text_of[cuts]]] - sums[cuts]) * inverses[place[cuts] - 1])
    found = right >= 0
    cuts = cuts[found]
    return text_of[cuts], left[found], right[found], place[cuts]


class _HashTable:
    """Finds which of `values` (uint64 [n]) others are."""

    def __init__(self, values: np.ndarray) -> None:
        self._index = np.argsort(values)
        self._ordered = values[self._index]
        # Most look-ups fail: one bit says so without a binary search.
        self._maybe = np.zeros(1 << 22, bool)
        self._maybe[values >> np.uint64(42)] = True

    def find(self, values: np.ndarray) -> np.ndarray:
        """int64 [m]: the index of each in the table's values, -1 where it is not there."""
        found = np.full(len(values), -1, np.int64)
        maybe = np.flatnonzero(self._maybe[values >> np.uint64(42)])
        near = np.searchsorted(self._ordered, values[maybe]).clip(max=len(self._ordered) - 1)
        hit = self._ordered[near] == values[maybe]
        found[maybe[hit]] = self._index[near[hit]]
        return found
