"""BERT's WordPiece vocabulary of a GGUF file or a `vocab.txt`, as a backend of the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from strop.core.config import MIB
from strop.core.errors import FormatError, UnsupportedError
from strop.formats.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED

MAX_WORD_LEN = 100
"""BERT's own limit: a longer word is unknown (llama.cpp has none, and takes quadratic time)."""

MAX_VOCAB_BYTES = 64 * MIB
_CLASSES = ("Bert", "DistilBert", "Electra")
_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "cls_token": "[CLS]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
_REFUSED: dict[str, tuple[Any, ...]] = {"do_basic_tokenize": (True, None), "never_split": (None, [])}
"""Keys that change the ids at values other than these."""


def wordpiece(
    texts: Sequence[str], types: Sequence[int], unknown_id: int, *, lowercase: bool, strips_accents: bool
) -> tokenizers.Tokenizer:
    """That of a GGUF file: greedy longest matches within words cut at spaces, punctuation and Han characters.

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


def from_vocab_file(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """That of a `vocab.txt`, a token a line, with what tokenizer_config.json says of BERT's tokenizer.

    Raises FormatError for a damaged file, UnsupportedError for other tokenizers that have such a file.
    """
    if path.stat().st_size > MAX_VOCAB_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_VOCAB_BYTES} bytes; fetch the model again")
    kind = config.get("tokenizer_class")
    if kind is not None and str(kind).removesuffix("Fast") not in [f"{name}Tokenizer" for name in _CLASSES]:
        raise UnsupportedError(
            f"vocab.txt belongs to tokenizer_class={kind!r:.80}; accepted are those of {', '.join(_CLASSES)}: save the"
            " tokenizer with transformers, which writes a tokenizer.json"
        )
    for key, accepted in _REFUSED.items():
        if config.get(key) not in accepted:
            raise UnsupportedError(f"tokenizer_config.json has {key}={config[key]!r:.80}; accepted is {accepted[0]}")
    try:
        texts = path.read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path.name} is not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None
    ids = {text: token_id for token_id, text in enumerate(texts)}
    if len(ids) < len(texts):
        raise FormatError(f"{path.name} lists a token twice; fetch the model again")
    names = {name: _text_of(config.get(name), default) for name, default in _SPECIAL.items()}
    wrapped = tokenizers.BertWordPieceTokenizer(
        ids,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
        **names,
    )
    return tokenizers.Tokenizer.from_str(wrapped.to_str())


def _text_of(token: Any, default: str) -> str:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else default
