"""BERT's WordPiece vocabulary of a GGUF file, as a backend of the `tokenizers` library."""

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from strop.core.errors import FormatError
from strop.formats.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED

MAX_WORD_LEN = 100
"""BERT's own limit: a longer word is unknown (llama.cpp has none, and takes quadratic time)."""


def wordpiece(
    texts: Sequence[str], types: Sequence[int], unknown_id: int, *, lowercase: bool, strips_accents: bool
) -> tokenizers.Tokenizer:
    """Greedy longest matches within words cut at spaces, punctuation and Han characters.

    GGUF writes `▁word` and the bare `continuation`; the library, as BERT's own files, `word` and `##continuation`.
    """
    special = [
        AddedToken(text, normalized=False, special=kind != USER_DEFINED)
        for text, kind in zip(texts, types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    names = {token.content for token in special} | {texts[unknown_id]}
    ids = {_bert_spelling(text, names): token_id for token_id, text in enumerate(texts)}
    if len(ids) < len(texts):
        raise FormatError("tokenizer.ggml.tokens holds a special token that is also a word; fetch the file again")
    backend = tokenizers.Tokenizer(
        models.WordPiece(ids, unk_token=texts[unknown_id], max_input_chars_per_word=MAX_WORD_LEN)
    )
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strips_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_tokens(special)
    return backend


def _bert_spelling(text: str, names: set[str]) -> str:
    if text in names:
        return text
    return text[1:] if text.startswith("▁") else f"##{text}"
