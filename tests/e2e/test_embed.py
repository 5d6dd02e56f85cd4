"""`strop embed` as a user starts it, and the other verbs on an encoder."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import MAX_SEQ_LENGTH, sentence_transformer, tiny_encoder

Strop = Callable[..., subprocess.CompletedProcess[str]]
CleanError = Callable[..., None]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_transformer(tiny_encoder(tmp_path_factory.mktemp("encoder")))


def test_texts_become_json_lines(strop: Strop, encoder: Path) -> None:
    result = strop("embed", encoder, "ab cd", "", "ab " * 60)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["index"], line["num_tokens"]) for line in lines] == [(0, 6), (1, 2), (2, MAX_SEQ_LENGTH)]
    assert [line.get("num_cut_tokens") for line in lines] == [None, None, 2 + 2 * 60 - MAX_SEQ_LENGTH]
    np.testing.assert_allclose([np.linalg.norm(line["embedding"]) for line in lines], 1, atol=1e-6)
    plan, warning = result.stderr.splitlines()[-2:]
    assert plan.startswith("memory: weights")
    assert warning == f"1 of 3 texts cut to {MAX_SEQ_LENGTH} tokens, the most this model takes"
    from_pipe = strop("embed", encoder, "-", stdin="ab cd\n\n" + "ab " * 60 + "\n")
    assert from_pipe.stdout == result.stdout


def test_options_reach_the_embedder(strop: Strop, encoder: Path, tiny: Path) -> None:
    plain = strop("embed", encoder, "ab cd", "--pooling", "cls", "--no-normalize", "--threads", 1)
    assert np.linalg.norm(json.loads(plain.stdout)["embedding"]) > 1.5
    decoder = strop("embed", tiny, "hello", "--context", 64)
    assert np.linalg.norm(json.loads(decoder.stdout)["embedding"]) == pytest.approx(1, abs=1e-6)


def test_what_cannot_be(strop: Strop, clean_error: CleanError, encoder: Path) -> None:
    clean_error(strop("embed", encoder, "ab " * 60, "--no-truncate"), "122 tokens", "--context 40", "64")
    clean_error(strop("embed", encoder, "ab", "--context", 65), "--context 65")
    for verb in (("run", encoder, "hi"), ("chat", encoder), ("bench", encoder)):
        clean_error(strop(*verb), "an encoder", "strop embed")
    clean_error(strop("eval", encoder), "an encoder")


def test_inspect_says_what_it_is(strop: Strop, encoder: Path) -> None:
    result = strop("inspect", encoder)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split("\t", 1) for line in result.stdout.splitlines() if line.count("\t") == 1)
    assert facts["network"].startswith("an encoder")
    assert facts["vocabulary"] == "61 tokens, no output head"
    assert "expected" not in facts
