"""SentencePiece's own file, `tokenizer.model` (a protobuf), of model folders that have no tokenizer.json."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, score_bpe

MAX_MODEL_BYTES = 64 << 20
_BPE = 2
# Classes of transformers that use the file's ids as they are; others shift them or add their own.
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
_CURE = "write a tokenizer.json: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` in transformers"


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What the file says; names of fields as in sentencepiece_model.proto."""

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    settings: dict[str, int] = field(default_factory=dict)
    """model_type, the ids of special pieces, and the normalizer's switches, where the file gives them."""
    character_map_bytes: int = 0


_TRAINER_FIELDS = {3: "model_type", 40: "unk_id", 41: "bos_id", 42: "eos_id"}
_NORMALIZER_FIELDS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
_PROTO_DEFAULTS = {"model_type": 1, "unk_id": 0, "bos_id": 1, "eos_id": 2} | dict.fromkeys(
    _NORMALIZER_FIELDS.values(), 1
)


@dataclass(frozen=True, slots=True)
class ModelFileTokenizer:
    """What a `tokenizer.model` comes to."""

    backend: tokenizers.Tokenizer
    stand_ins: dict[int, tuple[int, ...]]
    vocab_size: int
    adds_space_prefix: bool
    config: dict[str, Any]
    """What tokenizer_config.json says, over what the file's own settings and its class imply."""


def from_model_file(path: Path, config: Mapping[str, Any]) -> ModelFileTokenizer:
    """The tokenizer of a BPE `tokenizer.model`.

    `config` is tokenizer_config.json, whose added tokens become part of the vocabulary. FormatError for a damaged file;
    UnsupportedError for unigram models, text normalization, and classes that number tokens in their own way.
    """
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise UnsupportedError(
            f"{path}: tokenizer_class={kind!r} without a tokenizer.json; accepted: {', '.join(_CLASSES)}. {_CURE}"
        )
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise FormatError(f"{path} is larger than {MAX_MODEL_BYTES} bytes; fetch the model again")
    model = read_sentencepiece(path.read_bytes())
    settings = _PROTO_DEFAULTS | model.settings
    if settings["model_type"] != _BPE:
        raise UnsupportedError(f"{path}: model_type={settings['model_type']}; accepted: {_BPE} (BPE). {_CURE}")
    if model.character_map_bytes or settings["remove_extra_whitespaces"] or not settings["escape_whitespaces"]:
        raise UnsupportedError(f"{path}: it changes the text before cutting it, which Strop does not do here. {_CURE}")
    _add_tokens(model, config)
    if len(set(model.texts)) < len(model.texts):
        raise FormatError(f"{path}: a token is listed twice; fetch the model again")
    unknown_id = settings["unk_id"]
    pieces = Pieces(model.texts, model.types, model.scores, unknown_id if unknown_id < len(model.texts) else None)
    adds_space_prefix = bool(settings["add_dummy_prefix"])
    backend, stand_ins = score_bpe(pieces, adds_space_prefix=adds_space_prefix)
    implied: dict[str, Any] = {"add_bos_token": True}
    for name in ("bos", "eos"):
        if (token_id := settings[f"{name}_id"]) < len(model.texts):
            implied[f"{name}_token"] = model.texts[token_id]
    return ModelFileTokenizer(backend, stand_ins, len(model.texts), adds_space_prefix, {**implied, **config})


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """The parts of a ModelProto that say how to tokenize. FormatError if the bytes are not one."""
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            parts = dict(_fields(_message(value)))
            model.texts.append(_text(parts.get(1)))
            score = _message(parts.get(2, bytes(4)))
            if len(score) != 4:
                raise _damaged(f"a score of {len(score)} bytes")
            model.scores.append(struct.unpack("<f", score)[0])
            model.types.append(_integer(parts.get(3, NORMAL)))
        elif number in (2, 3):
            names = _TRAINER_FIELDS if number == 2 else _NORMALIZER_FIELDS
            parts = dict(_fields(_message(value)))
            model.settings.update({name: _integer(parts[key]) for key, name in names.items() if key in parts})
            if number == 3 and parts.get(2):
                model = SentencePieceModel(
                    model.texts, model.scores, model.types, model.settings, len(_message(parts[2]))
                )
    if not model.texts:
        raise _damaged("it has no pieces")
    return model


def _add_tokens(model: SentencePieceModel, config: Mapping[str, Any]) -> None:
    """Puts the tokens that only tokenizer_config.json lists after the file's own, at the ids it gives them."""
    try:
        listed = sorted(
            (int(i), str(spec["content"]), bool(spec.get("special")))
            for i, spec in (config.get("added_tokens_decoder") or {}).items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"tokenizer_config.json: added_tokens_decoder is malformed ({error})") from None
    for token_id, text, special in listed:
        kind = CONTROL if special else USER_DEFINED
        if token_id == len(model.texts):
            model.texts.append(text)
            model.scores.append(0.0)
            model.types.append(kind)
        elif 0 <= token_id < len(model.texts) and model.texts[token_id] == text:
            model.types[token_id] = model.types[token_id] if model.types[token_id] == UNKNOWN else kind
        else:
            raise FormatError(
                f"tokenizer_config.json gives {text!r} id {token_id}; tokenizer.model and the tokens before it leave"
                f" {len(model.texts)} as the next free one; fetch the model again"
            )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message: an int for a varint, bytes for the rest."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _damaged(f"wire type {wire}")
        if length > len(data) - position:
            raise _damaged(f"a field of {length} bytes passes the end")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _damaged("a number without an end")


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _damaged("a number where bytes belong")
    return value


def _integer(value: int | bytes) -> int:
    # Negative numbers (an id of -1: no such piece) come as 64 bits; read as large, they are past every vocabulary.
    if not isinstance(value, int):
        raise _damaged("bytes where a number belongs")
    return value


def _text(value: int | bytes | None) -> str:
    if not value:
        raise _damaged("a piece without text")
    try:
        return _message(value).decode()
    except UnicodeDecodeError:
        raise _damaged("a piece that is not UTF-8") from None


def _damaged(cause: str) -> FormatError:
    return FormatError(f"tokenizer.model is not a whole SentencePiece file: {cause}; fetch it again")
