"""Texts in, one vector each out: an encoder's or a decoder's hidden states, pooled. One thread calls everything."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, StropError
from strop.core.request import EmbeddingOutput, EmbeddingRequestOutput
from strop.engine.loading import LoadedModel, load_model
from strop.engine.pack import StepShape, bucket
from strop.engine.step import Caches, CompiledModel
from strop.engine.text import prepare_prompt
from strop.formats.sentence_transformers import Pooling, PoolingKind
from strop.models.cache import cache_groups, num_pool_blocks
from strop.models.layout import Single

log = logging.getLogger(__name__)

Text = str | Sequence[int]
"""Or its token ids, special ones included."""


@dataclass(slots=True)
class _Tokens:
    ids: tuple[int, ...]
    num_cut: int = 0


class Embedder:
    """Packs whole texts into steps; a text longer than a step, which only a decoder takes, has steps of its own.

    With the native kernels a text's vector does not depend on the texts around it.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        """Model and config are those of `load_model(..., runner="pooling")`."""
        assert model.pooling is not None
        self.spec = model.spec
        self.tokenizer = model.tokenizer
        self.memory = model.memory
        self.pooling: Pooling = model.pooling
        self.config = config
        self._compiled = CompiledModel(
            model.params, model.spec, Single(model.platform, config.block_len, config.kv_dtype)
        )
        self._num_blocks = [num_pool_blocks(config, group.window_len) for group in cache_groups(model.spec)]
        self._is_native = model.platform == "native"
        self._caches = self._new_caches()

    @classmethod
    def load(cls, model: str, config: EngineConfig | None = None) -> "Embedder":
        """For a GGUF file, a Hugging Face folder, an artifact or a Hub id; refuses what does not fit."""
        return cls(*load_model(model, config or EngineConfig(), runner="pooling"))

    def embed(
        self,
        texts: Iterable[Text],
        *,
        pooling: PoolingKind | None = None,
        normalize: bool | None = None,
        truncate: bool = True,
    ) -> Iterator[EmbeddingRequestOutput]:
        """One output per text, in order; `texts` are read as they are needed, so that memory does not grow with them.

        Args:
            pooling, normalize: instead of the model's own, `self.pooling`.
            truncate: a text longer than `config.max_context_len` is cut, as sentence-transformers does, and a warning
                says so; token ids never are. Without it the text is refused.

        Raises:
            RequestError: a text is empty (and the model has no special tokens to frame it), malformed or too long.
        """
        if pooling is not None and pooling not in get_args(PoolingKind):
            raise RequestError(f"pooling={pooling!r:.80} is unknown: choose from {', '.join(get_args(PoolingKind))}")
        how = replace(
            self.pooling,
            kind=self.pooling.kind if pooling is None else pooling,
            normalize=self.pooling.normalize if normalize is None else normalize,
        )
        num_texts = num_cut = 0
        for batch in self._batches(self._tokenize(texts, truncate)):
            for tokens, vector in zip(batch, self._vectors(batch, how), strict=True):
                yield EmbeddingRequestOutput(
                    str(num_texts), EmbeddingOutput(vector.tolist()), list(tokens.ids), tokens.num_cut
                )
                num_texts += 1
                num_cut += tokens.num_cut > 0
        if num_cut:
            limit = self.config.max_context_len
            log.warning("%d of %d texts cut to %d tokens, the most this model takes", num_cut, num_texts, limit)

    def _tokenize(self, texts: Iterable[Text], truncate: bool) -> Iterator[_Tokens]:
        limit = self.config.max_context_len
        for position, text in enumerate(texts):
            try:
                tokens = self._tokens_of(text, limit if truncate else None)
            except RequestError as error:
                raise RequestError(f"text {position}: {error}") from None
            if len(tokens.ids) > limit:
                raise RequestError(
                    f"text {position} has {len(tokens.ids)} tokens, and max_context_len={limit}: shorten it, or raise"
                    f" max_context_len up to the model's {self.spec.max_context_len}"
                )
            yield tokens

    def _tokens_of(self, text: Text, limit: int | None) -> _Tokens:
        """The tokens of a text that the model's pipeline would see, at most `limit` of them."""
        if not isinstance(text, str):
            return _Tokens(prepare_prompt(self.tokenizer, text, vocab_size=self.spec.vocab_size))
        text = self.pooling.prompt + text
        ids = self.tokenizer.encode(text.lower() if self.pooling.lowercase else text, add_special=False)
        too_many = 0 if limit is None else len(self.tokenizer.frame(ids)) - limit
        num_cut = min(max(too_many, 0), len(ids))
        framed = self.tokenizer.frame(ids[: len(ids) - num_cut])
        if not framed:
            raise RequestError("it is empty, and this model has no special tokens to stand for it: give some text")
        return _Tokens(tuple(framed), num_cut)

    def _batches(self, texts: Iterable[_Tokens]) -> Iterator[list[_Tokens]]:
        """As many texts as one step takes; a longer one by itself."""
        batch: list[_Tokens] = []
        num_tokens = 0
        for text in texts:
            is_full = num_tokens + len(text.ids) > self.config.max_step_tokens
            if batch and (is_full or len(batch) == self.config.max_num_seqs):
                yield batch
                batch, num_tokens = [], 0
            batch.append(text)
            num_tokens += len(text.ids)
        if batch:
            yield batch

    def _vectors(self, batch: list[_Tokens], how: Pooling) -> list[np.ndarray]:
        """float32 [D] of each text."""
        sums: list[np.ndarray | None] = [None] * len(batch)
        for start in range(0, max(len(text.ids) for text in batch), self.config.max_step_tokens):
            counts = [min(len(text.ids) - start, self.config.max_step_tokens) for text in batch]
            hidden, at = self._hidden(batch, start, counts), 0
            for i, count in enumerate(counts):
                sums[i] = _pool(how.kind, hidden[at : at + count], sums[i])
                at += count
        vectors = []
        for text, vector in zip(batch, sums, strict=True):
            assert vector is not None
            if how.kind == "mean":
                vector = vector / np.float32(len(text.ids))
            if not np.isfinite(vector).all():
                raise StropError("the model gave hidden states that are no numbers (NaN): its weights may be damaged")
            vectors.append(vector / max(np.linalg.norm(vector), np.float32(1e-12)) if how.normalize else vector)
        return vectors

    def _hidden(self, batch: list[_Tokens], start: int, counts: list[int]) -> np.ndarray:
        """Hidden states float32 [T, D] of tokens [start, start + count) of each text. The next call overwrites them."""
        lengths = [len(text.ids) for text in batch]
        shape = self._shape(sum(counts), len(batch), max(lengths))
        ints = np.zeros(shape.num_ints, np.int32)
        fields = ints[: 6 * shape.num_rows].reshape(6, -1)
        fields[4], fields[5] = 1, -1  # padding sees one slot, and nobody sees it
        tail = ints[6 * shape.num_rows :]
        tail[0] = sum(counts)
        tables = tail[2 + shape.num_seqs :].reshape(shape.num_groups, shape.num_seqs, shape.table_len)
        row = block = 0
        for seq, (text, length, count) in enumerate(zip(batch, lengths, counts, strict=True)):
            places = np.arange(start, start + count)
            ends = places + 1 if self.spec.causal else length
            rows = fields[:, row : row + count]
            rows[0] = text.ids[start : start + count]
            rows[1] = rows[2] = places
            rows[4], rows[5] = ends, seq
            num_blocks = -(-length // self.config.block_len)
            for table, pool_len in zip(tables, self._num_blocks, strict=True):
                # A group with a window may have fewer blocks than a text: those that the window has passed come again.
                table[seq, :num_blocks] = 1 + np.arange(block, block + num_blocks) % (pool_len - 1)
            row, block = row + count, block + num_blocks
        try:
            hidden, self._caches = self._compiled.hidden(self._caches, ints, shape)
            return np.asarray(hidden)
        except BaseException:
            for cache in self._caches:
                cache.delete()  # a failed step may or may not have consumed it
            self._caches = self._new_caches()
            raise

    def _new_caches(self) -> Caches:
        """None for an encoder on XLA, where rows of one step attend to each other faster without."""
        needed = self._is_native or self.spec.causal
        return self._compiled.new_caches(self._num_blocks) if needed else ()

    def _shape(self, num_rows: int, num_seqs: int, longest: int) -> StepShape:
        """The bucket of a step."""
        table_len = -(-(self.config.max_context_len if self._is_native else longest) // self.config.block_len)
        factor = 8 if self._is_native else 2  # the kernels skip padding, XLA computes it
        return StepShape(bucket(num_rows, factor, 64), bucket(num_seqs, 8), bucket(table_len, 2), len(self._num_blocks))


def _pool(kind: PoolingKind, hidden: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Hidden states [T, D] and what came of the text's earlier ones as float32 [D]; of a mean, the sum."""
    if kind == "cls":
        return hidden[0].copy() if before is None else before
    if kind == "last":
        return hidden[-1].copy()
    if kind == "mean":
        total: np.ndarray = hidden.sum(axis=0)
        return total if before is None else before + total
    largest: np.ndarray = hidden.max(axis=0)
    return largest if before is None else np.maximum(before, largest)
