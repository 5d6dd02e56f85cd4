"""The tokenizer in a GGUF file's metadata (keys `tokenizer.*` of the GGUF specification)."""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.chat_templates import templates_of_gguf
from strop.formats.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, score_bpe, unigram
from strop.formats.template import TemplateRenderer
from strop.formats.tokenizer import BYTE_OF_CHARACTER, END_TOKENS, SpecialTokens, Tokenizer, build, end_token_ids
from strop.formats.wordpiece import wordpiece

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words before merging: each pattern in turn cuts the pieces that the one before it left."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is itself in the vocabulary is taken whole, whatever the merges say."""
    adds_bos: bool = False
    """What holds when the file has no add_bos_token."""


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What holds for a kind of vocabulary where the file says nothing; ids by their key's name."""

    ids: tuple[tuple[str, int], ...] = ()
    adds_bos: bool = False
    adds_eos: bool = False


_SCORE_BPE = _Defaults((("bos", 1), ("eos", 2), ("unknown", 0)), adds_bos=True)
_UNIGRAM = _Defaults((("eos", 1), ("unknown", 2), ("padding", 0)), adds_eos=True)
_WORDPIECE = _Defaults((("bos", 101), ("unknown", 100), ("seperator", 102), ("padding", 0), ("mask", 103)), True)

# Phi-3 swallows the spaces after these names; a GGUF file has no field for it, and llama.cpp goes by the model's name.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_AFTER_NUMBERS}"
_QWEN2_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_AFTER_NUMBERS}"

_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2 = PreTokenizer((_GPT2_WORDS,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_LLAMA3_WORDS,), whole_words=True, adds_bos=True)
_THREE_DIGITS = PreTokenizer((_LLAMA3_WORDS,))
_QWEN2 = PreTokenizer((_QWEN2_WORDS,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2", "exaone4", "jais"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _THREE_DIGITS),
    "glm4": replace(_THREE_DIGITS, whole_words=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"), _QWEN2),
}
"""By the value of `tokenizer.ggml.pre`; the words are those that llama.cpp cuts."""


def tokenizer_from_gguf(metadata: Mapping[str, Any], renderer: TemplateRenderer | None = None) -> Tokenizer:
    """The tokenizer described by `metadata` (key -> value, arrays as sequences).

    FormatError if keys are missing or contradict each other; UnsupportedError for a model or pre-tokenizer not known.
    """
    model = metadata.get("tokenizer.ggml.model")
    make = _KINDS.get(model) if isinstance(model, str) else None
    if make is None:
        raise UnsupportedError(
            f"tokenizer.ggml.model={model!r} is not supported; accepted: {', '.join(map(repr, _KINDS))}. "
            "Use a GGUF of a model with such a vocabulary, or its Hugging Face folder"
        )
    return make(metadata, _Vocabulary.read(metadata), renderer)


def _byte_level_tokenizer(
    metadata: Mapping[str, Any], vocabulary: "_Vocabulary", renderer: TemplateRenderer | None
) -> Tokenizer:
    pre = _pre_tokenizer(metadata)
    backend = build("the GGUF file", lambda: _byte_level_bpe(vocabulary, _merges(metadata), pre))
    return Tokenizer(
        backend,
        "byte_level",
        _special_tokens(backend, metadata, vocabulary, _Defaults(adds_bos=pre.adds_bos)),
        vocab_size=len(vocabulary.texts),
        chat_templates=templates_of_gguf(metadata),
        renderer=renderer,
    )


def _score_bpe_tokenizer(
    metadata: Mapping[str, Any], vocabulary: "_Vocabulary", renderer: TemplateRenderer | None
) -> Tokenizer:
    adds_space_prefix = _optional(metadata, "tokenizer.ggml.add_space_prefix", bool) is not False
    pieces = _pieces(metadata, vocabulary, _SCORE_BPE)
    name = (_optional(metadata, "general.name", str) or "").lower()
    strips_after = frozenset(vocabulary.texts) - _PHI3_KEEPS_SPACE if any(x in name for x in _PHI3_NAMES) else ()
    backend, stand_ins = build(
        "the GGUF file",
        lambda: score_bpe(pieces, adds_space_prefix=adds_space_prefix, strips_after=frozenset(strips_after)),
    )
    return Tokenizer(
        backend,
        "metaspace",
        _special_tokens(backend, metadata, vocabulary, _SCORE_BPE),
        vocab_size=len(vocabulary.texts),
        stand_ins=stand_ins,
        strips_leading_space=adds_space_prefix,
        chat_templates=templates_of_gguf(metadata),
        renderer=renderer,
    )


def _unigram_tokenizer(
    metadata: Mapping[str, Any], vocabulary: "_Vocabulary", renderer: TemplateRenderer | None
) -> Tokenizer:
    pieces = _pieces(metadata, vocabulary, _UNIGRAM)
    adds_space_prefix = bool(_optional(metadata, "tokenizer.ggml.add_space_prefix", bool))
    merges_spaces = bool(_optional(metadata, "tokenizer.ggml.remove_extra_whitespaces", bool))
    character_map = b""
    if metadata.get("tokenizer.ggml.precompiled_charsmap") is not None:
        character_map = bytes(value & 0xFF for value in _integers(metadata, "tokenizer.ggml.precompiled_charsmap"))
    backend = build(
        "the GGUF file",
        lambda: unigram(
            pieces,
            adds_space_prefix=adds_space_prefix,
            merges_spaces=merges_spaces,
            character_map=character_map,
        ),
    )
    return Tokenizer(
        backend,
        "metaspace",
        _special_tokens(backend, metadata, vocabulary, _UNIGRAM),
        strips_leading_space=adds_space_prefix or merges_spaces,
        chat_templates=templates_of_gguf(metadata),
        renderer=renderer,
    )


def _wordpiece_tokenizer(
    metadata: Mapping[str, Any], vocabulary: "_Vocabulary", renderer: TemplateRenderer | None
) -> Tokenizer:
    lowercase = _optional(metadata, "tokenizer.ggml.normalizer.lowercase", bool) is not False
    strips_accents = _optional(metadata, "tokenizer.ggml.normalizer.strip_accents", bool)
    unknown_id = vocabulary.token_id(metadata, "unknown_token_id", _WORDPIECE)
    if unknown_id is None:
        raise FormatError("tokenizer.ggml.unknown_token_id is missing; fetch the file again")
    backend = build(
        "the GGUF file",
        lambda: wordpiece(
            vocabulary.texts,
            vocabulary.types,
            unknown_id,
            lowercase=lowercase,
            strips_accents=lowercase if strips_accents is None else strips_accents,
        ),
    )
    cls_key = "cls_token_id" if metadata.get("tokenizer.ggml.cls_token_id") is not None else "bos_token_id"
    ids = {
        "cls": vocabulary.token_id(metadata, cls_key, _WORDPIECE),
        "sep": vocabulary.token_id(metadata, "seperator_token_id", _WORDPIECE),
        "unk": unknown_id,
    }
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise FormatError(f"the GGUF file names no {' or '.join(missing)} token; fetch the file again")
    cls_id, sep_id = ids["cls"], ids["sep"]
    assert cls_id is not None and sep_id is not None
    names = tuple((f"{name}_token", vocabulary.texts[i]) for name, i in ids.items() if i is not None)
    special = SpecialTokens(prefix_ids=(cls_id,), suffix_ids=(sep_id,), template_names=names)
    return Tokenizer(backend, "wordpiece", special, vocab_size=len(vocabulary.texts), renderer=renderer)


_KINDS: dict[str, Callable[[Mapping[str, Any], "_Vocabulary", TemplateRenderer | None], Tokenizer]] = {
    "gpt2": _byte_level_tokenizer,
    "llama": _score_bpe_tokenizer,
    "t5": _unigram_tokenizer,
    "bert": _wordpiece_tokenizer,
}
"""By the value of `tokenizer.ggml.model`."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Token texts and types by id; texts are all different."""

    texts: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> "_Vocabulary":
        texts = _strings(metadata, "tokenizer.ggml.tokens")
        if not texts:
            raise FormatError("tokenizer.ggml.tokens is empty; fetch the file again")
        if "" in texts:  # no text can produce it, but its id must stay taken
            texts = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
        if len(set(texts)) < len(texts):
            twice = next(text for text, count in Counter(texts).items() if count > 1)
            raise FormatError(f"tokenizer.ggml.tokens holds {twice!r} twice; fetch the file again")
        types = [NORMAL] * len(texts)
        if metadata.get("tokenizer.ggml.token_type") is not None:
            types = _integers(metadata, "tokenizer.ggml.token_type")
        if len(types) != len(texts):
            raise FormatError(
                f"tokenizer.ggml.token_type has {len(types)} entries for {len(texts)} tokens; fetch the file again"
            )
        # Text that a user writes must not end a turn, whatever type the file gives such a token.
        for text in END_TOKENS.intersection(texts):
            types[texts.index(text)] = CONTROL
        return cls(texts, types)

    def token_id(self, metadata: Mapping[str, Any], name: str, defaults: _Defaults | None = None) -> int | None:
        """The id at `tokenizer.ggml.{name}`, else the default, else None. FormatError out of range."""
        key = f"tokenizer.ggml.{name}"
        value = metadata.get(key)
        if value is None:
            known = dict(defaults.ids).get(name.removesuffix("_token_id")) if defaults is not None else None
            return known if known is not None and known < len(self.texts) else None
        token_id = _integer(key, value)
        if not 0 <= token_id < len(self.texts):
            raise FormatError(f"{key}={token_id} is out of range: 0 to {len(self.texts) - 1}; fetch the file again")
        return token_id


def _byte_level_bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], pre: PreTokenizer) -> tokenizers.Tokenizer:
    ids = {text: token_id for token_id, text in enumerate(vocabulary.texts)}
    # A byte that has no token is dropped, but must keep its neighbours from merging: it gets an id past the vocabulary.
    missing = [character for character in map(chr, BYTE_OF_CHARACTER) if character not in ids]
    ids |= {character: len(ids) + i for i, character in enumerate(missing)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_words))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(text, normalized=False, special=kind != USER_DEFINED)
        for text, kind in zip(vocabulary.texts, vocabulary.types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_tokens(added)
    if backend.get_vocab_size() != len(ids):
        raise FormatError("tokenizer.ggml.tokens and tokenizer.ggml.token_type disagree; fetch the file again")
    return backend


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for text in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = text.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"tokenizer.ggml.merges holds {text!r}; each must be two tokens with one space between")
        merges.append((left, right))
    return merges


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _optional(metadata, "tokenizer.ggml.pre", str) or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"tokenizer.ggml.pre={name!r} is not supported; accepted: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Use the model's Hugging Face folder instead"
        )
    return PRE_TOKENIZERS[name]


def _pieces(metadata: Mapping[str, Any], vocabulary: _Vocabulary, defaults: _Defaults) -> Pieces:
    key = "tokenizer.ggml.scores"
    scores = list(_sequence(metadata, key))
    if not set(map(type, scores)) <= {int, float}:
        raise FormatError(f"{key} must hold numbers only; fetch the file again")
    if len(scores) != len(vocabulary.texts):
        raise FormatError(f"{key} has {len(scores)} entries for {len(vocabulary.texts)} tokens; fetch the file again")
    unknown_id = vocabulary.token_id(metadata, "unknown_token_id", defaults)
    return Pieces(vocabulary.texts, vocabulary.types, scores, unknown_id)


def _special_tokens(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], vocabulary: _Vocabulary, defaults: _Defaults
) -> SpecialTokens:
    ids = {name: vocabulary.token_id(metadata, f"{name}_token_id", defaults) for name in ("bos", "eos", "eot", "eom")}
    ids["unk"] = vocabulary.token_id(metadata, "unknown_token_id", defaults)
    ids["pad"] = vocabulary.token_id(metadata, "padding_token_id", defaults)
    add_bos = _optional(metadata, "tokenizer.ggml.add_bos_token", bool)
    add_eos = _optional(metadata, "tokenizer.ggml.add_eos_token", bool)
    bos, eos = ids["bos"], ids["eos"]
    adds_bos = defaults.adds_bos if add_bos is None else add_bos
    adds_eos = defaults.adds_eos if add_eos is None else add_eos
    for wanted, token_id, name in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
        if wanted and token_id is None:
            raise FormatError(f"tokenizer.ggml.add_{name}_token is set, but tokenizer.ggml.{name}_token_id is missing")
    return SpecialTokens(
        bos_id=bos,
        eos_ids=end_token_ids(backend, (i for i in (eos, ids["eot"], ids["eom"]) if i is not None)),
        prefix_ids=(bos,) if adds_bos and bos is not None else (),
        suffix_ids=(eos,) if adds_eos and eos is not None else (),
        template_names=tuple(
            (f"{name}_token", vocabulary.texts[i])
            for name in ("bos", "eos", "unk", "pad")
            if (i := ids[name]) is not None
        ),
    )


def _optional(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, kind):
        raise FormatError(f"{key} must be of type {kind.__name__}, not {type(value).__name__}; fetch the file again")
    return value


def _sequence(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = metadata.get(key)
    if value is None:
        raise FormatError(f"{key} is missing; fetch the file again, or use the model's Hugging Face folder")
    if isinstance(value, str | bytes) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise FormatError(f"{key} must be an array, not {type(value).__name__}; fetch the file again")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = list(_sequence(metadata, key))
    if set(map(type, values)) - {str}:
        raise FormatError(f"{key} must hold strings only; fetch the file again")
    return values


def _integers(metadata: Mapping[str, Any], key: str) -> list[int]:
    values = list(_sequence(metadata, key))
    return values if set(map(type, values)) <= {int} else [_integer(key, value) for value in values]


def _integer(key: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise FormatError(f"{key} must hold integers, not {type(value).__name__}; fetch the file again") from None
