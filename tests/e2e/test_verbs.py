"""`strop eval`, `strop inspect` and `strop models` as a user starts them."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_llm import tiny_llm

Strop = Callable[..., subprocess.CompletedProcess[str]]
CleanError = Callable[..., None]

SMALL = ("--windows", 2, "--window-tokens", 80)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Caches of the test's own."""
    return {"STROP_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_eval_of_the_real_model_against_itself(strop: Strop, smollm2_path: Path) -> None:
    """The reference is float32 on the same weights: close, and not the same, as the kernels round to int8."""
    result = strop("eval", smollm2_path, "--reference", smollm2_path, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["num_windows"], found["num_positions"]) == (2, 156)
    assert 10 < found["perplexity"]["low"] < found["perplexity"]["mean"] < found["perplexity"]["high"] < 200
    fidelity = found["fidelity"]
    assert 0 <= fidelity["kl_nat"]["low"] <= fidelity["kl_nat"]["mean"] < 0.02
    assert 0.85 < fidelity["top1_agreement"]["mean"] <= fidelity["top1_agreement"]["high"] <= 1
    ratio = found["perplexity"]["mean"] / found["reference_perplexity"]["mean"]
    assert fidelity["perplexity_ratio"]["mean"] == pytest.approx(ratio, rel=1e-3)
    assert found["source_hash"] == found["reference_hash"]


def test_eval_in_words(strop: Strop, tiny: Path) -> None:
    result = strop("eval", tiny, "--reference", tiny, *SMALL)
    assert result.returncode == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == [
        "measured on",
        "perplexity",
        "reference perplexity",
        "perplexity ratio",
        "KL divergence",
        "top-1 agreement",
    ]
    assert result.stderr.startswith("running the reference in float32: 160 tokens of ")


def test_eval_tells_plain_text_from_noise(strop: Strop, smollm2_path: Path, tmp_path: Path) -> None:
    def perplexity(*options: object, **kwargs: str) -> float:
        result = strop("eval", smollm2_path, *SMALL, *options, "--json", **kwargs)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["fidelity"] is None
        return float(found["perplexity"]["mean"])

    plain = "The cat sat on the mat and looked at the dog. The dog looked at the cat. " * 12
    (tmp_path / "text.txt").write_text(plain)
    from_file = perplexity("--text", tmp_path / "text.txt")
    assert perplexity("--text", "-", stdin=plain) == from_file
    noise = " ".join(str(number * 7919 % 10007) for number in range(300))
    assert perplexity("--text", "-", stdin=noise) > 2 * from_file


@pytest.mark.parametrize("case", ["short", "latin-1", "missing", "vocabulary", "window"])
def test_eval_refuses(
    case: str, strop: Strop, clean_error: CleanError, tiny: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(
        {"short": b"too short", "latin-1": "caf\u00e9 ".encode("latin-1") * 200}.get(case, b"plenty " * 200)
    )
    options, named = {
        "short": (("--text", text), ("tokens", "longer text")),
        "latin-1": (("--text", text), (str(text), "not UTF-8", "byte 3")),
        "missing": (("--text", tmp_path / "none.txt"), ("none.txt", "cannot be read")),
        "vocabulary": (("--reference", smollm2_path), ("268", "49,152", "vocabularies differ")),
        "window": (("--window-tokens", 0), ("--window-tokens 0",)),
    }[case]
    clean_error(strop("eval", tiny, *options), *named)


def test_inspect_the_real_model(strop: Strop, smollm2_path: Path) -> None:
    text = strop("inspect", smollm2_path, "--context", 2048)
    assert text.returncode == 0, text.stderr
    for part in (
        "layers\t30",
        "9 query heads on 3 key-value heads of 64 dims",
        "Q4_1\t210\t",
        "all\t272\t134,515,008\t",
        "runs on\t",
        "memory\tweights ",
        "at most\tone sequence decodes ",
        " at 2,048 tokens of context",
    ):
        assert part in text.stdout
    assert "\x1b" not in text.stdout
    found = json.loads(strop("inspect", smollm2_path, "--json").stdout)
    assert found["problems"] == []
    assert len(found["tensors"]) == 272
    near, far = found["speed_limit"]["decode"]
    assert near["context_tokens"] < far["context_tokens"] == 8192
    assert near["tokens_per_s"] > 1 and near["step_bytes"] < far["step_bytes"]
    weight_bytes = found["memory"]["weight_bytes"]
    assert weight_bytes <= near["step_bytes"] < 1.1 * weight_bytes + 2**23


def test_inspect_measures_and_lists(strop: Strop, clean_error: CleanError, smollm2_path: Path, tiny: Path) -> None:
    result = strop("inspect", smollm2_path, "--measure", "--no-speed", "--tensors", "--context", 1024)
    assert result.returncode == 0, result.stderr
    assert "token_embd.weight\t49152 x 576\tQ8_0\t28.7 MiB" in result.stdout
    assert re.search(
        r"expected\tone sequence decodes [\d,]+ tokens/s; prefill of 512 tokens [\d,]+ tokens/s", result.stdout
    )
    clean_error(strop("inspect", tiny, "--measure", "--no-speed"), "--context 128", "640")


def test_inspect_what_cannot_run(strop: Strop, tmp_path: Path) -> None:
    model = tiny_llm()
    model.tensors[0].type_id = 19  # IQ1_S
    path = tmp_path / "model.gguf"
    path.write_bytes(model.build())
    result = strop("inspect", path)
    assert result.returncode == 1
    assert "general.architecture\tllama" in result.stdout and "\nIQ1_S\t1\t" in result.stdout
    assert result.stderr.startswith("strop: ") and "IQ1_S" in result.stderr and result.stderr.count("\n") == 1


def test_inspect_what_does_not_fit(strop: Strop, tiny: Path) -> None:
    result = strop("inspect", tiny, "--memory", 0.01, "--no-speed")
    assert result.returncode == 1
    assert "--memory" in result.stderr and "layers\t2" in result.stdout


def test_models_listed_and_removed(strop: Strop, clean_error: CleanError, tiny: Path, offline: dict[str, str]) -> None:
    assert strop("models", env=offline).stdout == "nothing is cached\n"
    assert json.loads(strop("models", "--json", env=offline).stdout) == []
    snapshot = Path(offline["HF_HUB_CACHE"]) / "models--org--name" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "model.gguf").write_bytes(tiny.read_bytes())
    for model in (tiny, snapshot):
        assert strop("run", model, "hello", "--max-tokens", 1, env=offline).returncode == 0
    listed = strop("models", env=offline)
    assert listed.stdout.splitlines()[0] == "model\tkind\tsize\tlast used\thash\tsource"
    found = json.loads(strop("models", "--json", env=offline).stdout)
    kinds = [(model["kind"], model["name"]) for model in found]
    assert ("hub", "org/name") in kinds
    assert [kind for kind, _ in kinds].count("packed") <= 1  # same content, one pack; none without native kernels
    clean_error(strop("models", "remove", "nothing-like-it", env=offline), "nothing-like-it", "not cached")
    clean_error(strop("models", "remove", "ababab", env=offline), "org/name", "--yes")
    assert snapshot.exists()
    removed = strop("models", "remove", "ababab", "--yes", env=offline)
    assert removed.returncode == 0 and removed.stdout.startswith("org/name (hub): freed ")
    assert not snapshot.exists()
    if ("packed", "tiny.gguf") in kinds:
        assert strop("models", "remove", "tiny", "--yes", env=offline).stdout.startswith("tiny.gguf (packed): freed ")
        assert strop("models", env=offline).stdout == "nothing is cached\n"
    assert tiny.exists()
