"""A tiny Llama as quantisers store it, against the same weights dequantised: logits on XLA and on the kernels."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from quantized_files import Quantized, Tensors, awq, fp8, gptq, packed, write_safetensors

from strop.core.config import EngineConfig
from strop.core.errors import UnsupportedError
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel
from strop.formats.checkpoint import open_checkpoint
from strop.formats.hf import HFCheckpoint
from strop.models.load import load
from strop.models.memory import plan_memory, weight_bytes
from strop.models.reader import ParameterReader, load_spec
from strop.ops import native
from strop.ops.dispatch import Platform

SOURCE = Path(__file__).parent.parent / "golden" / "llama-rope-llama3-bf16"
TOKENS = [5, 17, 96, 0, 33, 33, 8, 71, 12, 64, 90, 2]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def in_act_order(weight: np.ndarray) -> Quantized:
    """Its value is rounded to float16, in which it is held."""
    k_len = weight.shape[1]
    stored = gptq(weight, group_of=np.random.default_rng(k_len).permutation(k_len) // 32)
    return Quantized(stored.tensors, stored.value.astype(np.float16).astype(np.float64))


Quantise = Callable[[np.ndarray], Quantized]
CASES: dict[str, tuple[dict[str, object], Quantise, str]] = {
    "gptq": (GPTQ, gptq, "q4"),
    "gptq asym": (GPTQ | {"sym": False}, lambda w: gptq(w, symmetric=False), "q4_zeros"),
    "gptq act-order": (GPTQ | {"desc_act": True}, in_act_order, "f16"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq,
        "q4_zeros",
    ),
    "packed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        lambda w: packed(w, group_size=-1),
        "q4",
    ),
    "fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]},
        lambda w: fp8(w, block=(16, 32)),
        "bf16",
    ),
}


def write_models(folder: Path, settings: dict[str, object], quantise: Quantise) -> tuple[Path, Path]:
    """The quantised model, and the one of its weights in float32."""
    source = HFCheckpoint(SOURCE)
    stored: Tensors = {}
    exact: Tensors = {}
    for name in source.tensors:
        tensor = source.read(name)
        assert isinstance(tensor, np.ndarray)
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj"):
            quantised = quantise(tensor.astype(np.float32))
            stored |= {f"{stem}.{suffix}": part for suffix, part in quantised.tensors.items()}
            exact[name] = quantised.value.astype(np.float32)
        else:
            stored[name] = tensor
            exact[name] = tensor.astype(np.float32)
    config = json.loads((SOURCE / "config.json").read_text())
    for path, tensors, changed in (("quantised", stored, {"quantization_config": settings}), ("exact", exact, {})):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config | changed))
        write_safetensors(folder / path / "model.safetensors", tensors)
    return folder / "quantised", folder / "exact"


def engine_of(path: Path, platform: Platform) -> Engine:
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    reader = ParameterReader(checkpoint, spec)
    config = EngineConfig(
        max_num_seqs=2, max_step_tokens=64, max_context_len=64, block_len=32, num_blocks=5, num_threads=2
    )
    params = load(reader, spec, platform, num_positions=64, source_hash=checkpoint.source_hash)
    memory = plan_memory(reader, spec, config, platform, available_bytes=2**32)
    return Engine(LoadedModel(spec, params, SimpleNamespace(eos_ids=frozenset()), memory, platform), config)  # type: ignore[arg-type]


def scores(engine: Engine) -> np.ndarray:
    return np.concatenate(list(engine.score(TOKENS)))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    settings, quantise, kernel_format = CASES[name]
    quantised, exact = write_models(tmp_path, settings, quantise)
    expected = scores(engine_of(exact, "xla"))
    np.testing.assert_allclose(scores(engine_of(quantised, "xla")), expected, rtol=0, atol=1e-5)
    if not native.register():
        pytest.skip("the native library is not built")
    engine = engine_of(quantised, "native")
    formats = {
        stack: weight.format for stack, weight in engine.params.weights.items() if stack not in ("embed", "head")
    }
    assert set(formats.values()) == {kernel_format}
    # Activations are rounded to 8 bits per group, or to bf16.
    error = scores(engine) - expected
    assert np.sqrt(np.mean(np.square(error))) < 0.03 * np.sqrt(np.mean(np.square(expected)))


def test_memory_is_planned_from_what_is_loaded(tmp_path: Path) -> None:
    """Tiles round the planned bytes up to whole rows of 16, and nothing else."""
    if not native.register():
        pytest.skip("the native library is not built")
    for name in ("gptq asym", "gptq act-order", "fp8"):
        settings, quantise, _ = CASES[name]
        folder = tmp_path / name
        folder.mkdir()
        quantised, _ = write_models(folder, settings, quantise)
        checkpoint = open_checkpoint(quantised)
        planned = weight_bytes(ParameterReader(checkpoint, load_spec(checkpoint)), "native", 4)
        params = engine_of(quantised, "native").params
        loaded = sum(weight.data.nbytes for weight in params.weights.values())
        loaded += sum(vector.nbytes for vector in params.vectors.values())
        assert planned == pytest.approx(loaded, rel=0.15)


def test_a_quantised_module_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    quantised, _ = write_models(tmp_path, GPTQ, gptq)
    checkpoint = open_checkpoint(quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    checkpoint = open_checkpoint(quantised)
    with pytest.raises(UnsupportedError, match=r"does not have: .*model\.layers\.2\.self_attn\.q_proj\.weight"):
        ParameterReader(checkpoint, load_spec(checkpoint))


def test_biases_of_zeros_are_ignored_and_others_refused(tmp_path: Path) -> None:
    def with_bias(weight: np.ndarray) -> Quantized:
        stored = gptq(weight)
        return Quantized(stored.tensors | {"bias": np.zeros(len(weight), np.float16)}, stored.value)

    quantised, exact = write_models(tmp_path, GPTQ, with_bias)
    np.testing.assert_allclose(scores(engine_of(quantised, "xla")), scores(engine_of(exact, "xla")), rtol=0, atol=1e-5)
    (tmp_path / "ones").mkdir()

    def with_ones(weight: np.ndarray) -> Quantized:
        stored = gptq(weight)
        return Quantized(stored.tensors | {"bias": np.ones(len(weight), np.float16)}, stored.value)

    quantised, _ = write_models(tmp_path / "ones", GPTQ, with_ones)
    with pytest.raises(UnsupportedError, match=r"does not have: .*q_proj\.bias"):
        ParameterReader(open_checkpoint(quantised), load_spec(open_checkpoint(quantised)))
