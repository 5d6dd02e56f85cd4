"""tokenizer.model is read as its protobuf says, within its bounds, or refused with the cure."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core.errors import FormatError, StropError, UnsupportedError
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN
from strop.formats.sentencepiece_file import read_sentencepiece
from strop.formats.tokenizer import Tokenizer, tokenizer_from_folder

BPE = 2
PIECES = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((text, -float(i), NORMAL) for i, text in enumerate(["▁a", "ab", "▁ab", "abab", "a", "b", "▁", "c"])),
]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def model(pieces: list[tuple[str, float, int]] = PIECES, *, kind: int = BPE, normalizer: bytes | None = None) -> bytes:
    entries = [
        message(1, message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, type_id))
        for text, score, type_id in pieces
    ]
    trainer = number(3, kind) + message(1, b"an input file") + number(43, 2**64 - 1)  # pad_id -1: none
    switches = number(3, 1) + number(4, 0) if normalizer is None else normalizer
    return b"".join(entries) + message(2, trainer) + message(3, switches)


def load(path: Path, data: bytes, **config: Any) -> Tokenizer:
    (path / "tokenizer.model").write_bytes(data)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_from_folder(path)


def test_ids_are_those_of_the_same_vocabulary_in_a_gguf(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model())
    texts, scores, types = zip(*PIECES, strict=True)
    names = {"model": "llama", "tokens": list(texts), "scores": list(scores), "token_type": list(types)}
    from_gguf = tokenizer_from_gguf({f"tokenizer.ggml.{key}": item for key, item in names.items()})

    @settings(max_examples=100, deadline=None)
    @given(st.text("abcé \n", max_size=30))
    def agrees(text: str) -> None:
        assert tokenizer.encode(text) == from_gguf.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text

    agrees()
    assert tokenizer.encode("ab") == [1, 261]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, frozenset({2}), len(PIECES))


def test_the_config_adds_tokens_and_frames(tmp_path: Path) -> None:
    end = len(PIECES)
    added = {str(end): {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>", "special": True}}
    tokenizer = load(tmp_path, model(), added_tokens_decoder=added, eos_token="<|im_end|>", add_eos_token=True)
    assert tokenizer.encode("ab") == [1, 261, end]
    assert tokenizer.vocab_size == end + 1
    with pytest.raises(FormatError, match="gives '<far>' id 400"):
        load(tmp_path, model(), added_tokens_decoder={"400": {"content": "<far>"}})


def test_no_space_goes_before_the_text_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, model(normalizer=number(3, 0) + number(4, 0)))
    assert tokenizer.encode("ab", False) == [260]


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (model(kind=1), {}, "model_type=1"),
        (model(normalizer=b""), {}, "changes the text"),  # extra spaces go, by default
        (model(normalizer=number(4, 0) + message(2, b"compiled")), {}, "changes the text"),
        (model(), {"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class='XLMRobertaTokenizer'"),
    ],
)
def test_what_is_not_read_is_refused_with_the_cure(
    tmp_path: Path, data: bytes, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{message}.*write a tokenizer.json: `AutoTokenizer"):
        load(tmp_path, data, **config)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a protobuf",
        model()[:-3],
        message(1, message(1, b"\xff")),
        message(1, b""),
        message(1, message(1, b"a") + message(2, b"abc")),
        varint(1 << 3 | 2) + varint(1 << 60),
        b"\x0a" + b"\xff" * 20,
        model([*PIECES, PIECES[-1]]),
        model([("a", float("nan"), NORMAL)]),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FormatError):
        load(tmp_path, data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bytes_make_the_reader_fail_otherwise(data: st.DataObject) -> None:
    raw = bytearray(model(PIECES[:4] + PIECES[-4:]))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StropError):
        read_sentencepiece(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
