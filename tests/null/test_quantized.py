"""Quantised Hugging Face folders: values are exactly what the formats' definitions say, and the rest is refused."""

import contextlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from quantized_files import Quantized, Tensors, awq, fp8, gptq, int8, packed, write_safetensors

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.hf import HFCheckpoint
from strop.formats.values import GroupQuantized, dense
from strop.models.packing import packed_format

RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((48, 128)).astype(np.float32)
SCATTERED = RNG.permutation(128) // 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
}


def folder_of(path: Path, settings: Any, tensors: Tensors, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"quantization_config": settings, **config}))
    write_safetensors(path / "model.safetensors", {"norm.weight": np.ones(4, np.float32), **tensors})
    return path


def named(stored: Quantized, stem: str = "proj") -> Tensors:
    return {f"{stem}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}


CASES: dict[str, tuple[dict[str, Any], Quantized, str]] = {
    "gptq sym": (GPTQ, gptq(WEIGHT), "q4"),
    "gptq v2 sym": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(WEIGHT, v2=True), "q4"),
    "gptq 64": (GPTQ | {"group_size": 64}, gptq(WEIGHT, group_size=64), "q4"),
    "gptq 128 asym": (
        GPTQ | {"group_size": 128, "sym": False},
        gptq(WEIGHT, group_size=128, symmetric=False),
        "q4_zeros",
    ),
    "gptq row": (GPTQ | {"group_size": -1}, gptq(WEIGHT, group_size=-1), "q4"),
    "gptq asym": (GPTQ | {"sym": False}, gptq(WEIGHT, symmetric=False), "q4_zeros"),
    "gptq v2 asym": (
        GPTQ | {"sym": False, "format": "gptq_v2"},
        gptq(WEIGHT, symmetric=False, v2=True),
        "q4_zeros",
    ),
    # A zero of 0 is stored as minus one: its borrow reaches the fields above it.
    "gptq zero 0": (GPTQ | {"sym": False}, gptq(np.abs(WEIGHT), symmetric=False), "q4_zeros"),
    "gptq 8 bits": (GPTQ | {"bits": 8}, gptq(WEIGHT, bits=8), "q8"),
    "gptq 8 bits asym": (GPTQ | {"bits": 8, "sym": False}, gptq(WEIGHT, bits=8, symmetric=False), "q8_zeros"),
    "gptq runs": (GPTQ | {"desc_act": True}, gptq(WEIGHT, group_of=np.repeat([2, 0, 3, 1], 32)), "q4"),
    "awq": (AWQ, awq(WEIGHT), "q4_zeros"),
    "awq 64": (AWQ | {"group_size": 64, "version": "GEMM"}, awq(WEIGHT, group_size=64), "q4_zeros"),
    "awq row": (AWQ | {"group_size": -1}, awq(WEIGHT, group_size=-1), "q4_zeros"),
    "packed": (COMPRESSED, packed(WEIGHT), "q4"),
    "packed asym": (COMPRESSED, packed(WEIGHT, symmetric=False), "q4_zeros"),
    "packed 8 bits": (COMPRESSED, packed(WEIGHT, bits=8, group_size=-1), "q8"),
    "int8": (COMPRESSED | {"format": "int-quantized"}, int8(WEIGHT), "q8"),
    "fp8 blocks": (FP8, fp8(WEIGHT, block=(32, 64)), "bf16"),
    "fp8 powers of two": (
        FP8 | {"scale_fmt": "ue8m0"},
        fp8(WEIGHT, block=(32, 64), scale_dtype=ml_dtypes.float8_e8m0fnu),
        "bf16",
    ),
    "fp8 matrix": (FP8 | {"weight_block_size": None}, fp8(WEIGHT, block=None, name="weight_scale"), "bf16"),
    "fp8 rows": (
        COMPRESSED | {"format": "float-quantized"},
        fp8(WEIGHT, block=(1, 128), name="weight_scale"),
        "bf16",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8(WEIGHT, block=(1, 128), name="weight_scale"), "bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_exact_and_in_the_kernels_format(name: str, tmp_path: Path) -> None:
    settings, stored, kernel_format = CASES[name]
    checkpoint = HFCheckpoint(folder_of(tmp_path, settings, named(stored)))
    assert set(checkpoint.tensors) == {"norm.weight", "proj.weight"}
    assert "quantization_config" not in checkpoint.config
    value = checkpoint.read("proj.weight")
    np.testing.assert_array_equal(dense(value).astype(np.float64), stored.value)
    assert packed_format(value) == kernel_format
    info = checkpoint.tensors["proj.weight"]
    assert info.shape == value.shape == WEIGHT.shape
    if isinstance(value, GroupQuantized):
        groups = 48 * 4 * (2 if isinstance(value.zero, np.ndarray) else 1)
        assert info.num_bytes == 48 * 128 * value.bits // 8 + 2 * groups
    else:
        assert info.num_bytes == value.nbytes
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), np.ones(4))


@pytest.mark.parametrize(
    ("settings", "stored", "dtype"),
    [
        (GPTQ | {"desc_act": True}, gptq(WEIGHT, group_of=SCATTERED), np.float16),
        (GPTQ | {"desc_act": True, "sym": False}, gptq(WEIGHT, symmetric=False, group_of=SCATTERED), np.float16),
        (COMPRESSED, packed(WEIGHT, group_of=SCATTERED), ml_dtypes.bfloat16),
        (GPTQ | {"group_size": 16}, gptq(WEIGHT, group_size=16), np.float16),
    ],
)
def test_scattered_groups_become_floats_and_that_is_said(
    settings: dict[str, Any], stored: Quantized, dtype: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint = HFCheckpoint(folder_of(tmp_path, settings, named(stored)))
    assert "1 of 1" in caplog.text and "act-order" in caplog.text and "16-bit floats" in caplog.text
    value = checkpoint.read("proj.weight")
    assert isinstance(value, np.ndarray) and value.dtype == dtype
    np.testing.assert_array_equal(value, stored.value.astype(np.float32).astype(dtype))
    assert checkpoint.tensors["proj.weight"].num_bytes == value.nbytes


def test_a_g_idx_of_zeros_or_none_means_no_act_order(tmp_path: Path) -> None:
    stored = gptq(WEIGHT)
    tensors = named(stored)
    tensors["proj.g_idx"] = np.zeros(128, np.int32)
    np.testing.assert_array_equal(
        dense(HFCheckpoint(folder_of(tmp_path / "zeros", GPTQ, tensors)).read("proj.weight")), stored.value
    )
    del tensors["proj.g_idx"]
    np.testing.assert_array_equal(
        dense(HFCheckpoint(folder_of(tmp_path / "none", GPTQ, tensors)).read("proj.weight")), stored.value
    )


def test_scales_beyond_float16_stay_exact(tmp_path: Path) -> None:
    stored = packed(WEIGHT)
    scale = stored.tensors["weight_scale"].copy()
    scale[0, 0] = 1e-12
    tensors = named(stored) | {"proj.weight_scale": scale}
    value = HFCheckpoint(folder_of(tmp_path, COMPRESSED, tensors)).read("proj.weight")
    assert isinstance(value, np.ndarray) and value.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(value[1:], stored.value[1:].astype(np.float32).astype(ml_dtypes.bfloat16))
    assert 0 < np.abs(value[0, :32].astype(np.float32)).max() < 1e-10


@pytest.mark.parametrize(("file_name", "settings", "stored"), [
    ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}, gptq(WEIGHT)),
    ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, awq(WEIGHT)),
])  # fmt: skip
def test_settings_beside_the_config(
    file_name: str, settings: dict[str, Any], stored: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path, None, named(stored))
    with pytest.raises(UnsupportedError, match=r"quantised tensors.*no quantization_config"):
        HFCheckpoint(folder)
    (folder / file_name).write_text(json.dumps(settings))
    checkpoint = HFCheckpoint(folder)
    np.testing.assert_array_equal(dense(checkpoint.read("proj.weight")), stored.value)
    first = checkpoint.source_hash()
    (folder / file_name).write_text(json.dumps(settings | {"meta": {}} if "bits" in settings else settings, indent=1))
    assert HFCheckpoint(folder).source_hash() != first


def test_biases_of_zeros_that_the_quantiser_added_are_known(tmp_path: Path) -> None:
    tensors = {
        **named(gptq(WEIGHT)),
        **named(gptq(WEIGHT), "other"),
        "proj.bias": np.zeros(48, np.float16),
        "other.bias": np.ones(48, np.float16),
        "norm.bias": np.zeros(4, np.float16),
    }
    checkpoint = HFCheckpoint(folder_of(tmp_path, GPTQ, tensors))
    assert [name for name in checkpoint.tensors if checkpoint.is_empty_bias(name)] == ["proj.bias"]


def test_scales_of_activations_and_of_the_cache_are_dropped(tmp_path: Path) -> None:
    one = np.ones((), np.float32)
    extra = {"proj.input_scale": one, "attn.k_scale": one, "attn.v_scale": one}
    checkpoint = HFCheckpoint(folder_of(tmp_path, FP8, named(fp8(WEIGHT, block=(32, 64))) | extra))
    assert set(checkpoint.tensors) == {"norm.weight", "proj.weight"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.*dequantize"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "hqq"}, "'hqq'.*gptq, awq, fp8.*GGUF"),
        ({"quant_method": "eetq"}, "'eetq'"),
        ({"quant_method": "quanto"}, "'quanto'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'.*bfloat16 version"),
        ({"quant_method": ["gptq"]}, "gptq"),
        ({"bits": 4}, "an unknown quantiser"),
        ({}, "no quantization_config"),
        (GPTQ | {"bits": 3}, "bits=3; accepted is 4 or 8"),
        (GPTQ | {"bits": True}, "bits=True"),
        ({"quant_method": "gptq", "group_size": 32}, "lacks bits"),
        (GPTQ | {"group_size": 0}, "group_size=0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'.*'gptq_v2'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic=.*unquantised"),
        (GPTQ | {"rotation": "hadamard"}, "rotation='hadamard'"),
        (GPTQ | {"new_key": 1}, "new_key=1; accepted is only keys"),
        (AWQ | {"version": "gemv"}, "version='gemv'; accepted is 'gemm'"),
        (AWQ | {"version": "marlin"}, "version='marlin'"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"backend": "llm-awq"}, "backend='llm-awq'"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (COMPRESSED | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}}, "num_bits=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(settings: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=words) as error:
        HFCheckpoint(folder_of(tmp_path, settings, named(gptq(WEIGHT))))
    assert "GGUF" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "stored", "change", "words"),
    [
        (GPTQ, gptq(WEIGHT), {"scales": None}, "'proj.scales' of a quantised weight is missing"),
        (GPTQ | {"group_size": 64}, gptq(WEIGHT), {}, r"'proj.scales' is F16 \(4, 48\).*\(2, 48\)"),
        (GPTQ, gptq(WEIGHT), {"weight": WEIGHT}, "'proj.weight' is there twice"),
        (GPTQ, gptq(WEIGHT), {"g_idx": np.full(128, 4, np.int32)}, "names groups from 4 to 4 of 4"),
        (GPTQ, gptq(WEIGHT), {"g_idx": np.zeros(64, np.int32)}, "'proj.g_idx' is I32"),
        (GPTQ, gptq(WEIGHT), {"qweight": np.zeros(8, np.int32)}, "expected a matrix"),
        (GPTQ | {"bits": 8}, gptq(WEIGHT), {}, "expected"),
        (AWQ, awq(WEIGHT), {"qzeros": np.zeros((4, 6), np.float32)}, "'proj.qzeros' is F32"),
        (AWQ | {"group_size": 48}, awq(WEIGHT), {}, "whole groups of 48"),
        (FP8, fp8(WEIGHT, block=(32, 32)), {}, r"shape \(2, 4\), expected one scale.*block of \(32, 64\)"),
        (FP8, fp8(WEIGHT, block=(32, 64)), {"weight_scale_inv": None}, "'proj.weight_scale'.*missing"),
        (COMPRESSED, packed(WEIGHT), {"weight_shape": np.array([48, 100])}, "does not fit words"),
        (COMPRESSED, packed(WEIGHT), {"weight_shape": np.array([-48, -128])}, "does not fit words"),
        (COMPRESSED, packed(WEIGHT), {"weight_shape": None}, "'proj.weight_shape'.*missing"),
        (COMPRESSED, packed(WEIGHT), {"weight_scale": np.ones((48, 5), np.float16)}, "does not fit words"),
        (COMPRESSED, packed(WEIGHT), {"weight_g_idx": np.full(128, 9, np.int32)}, "names group 9 of 4"),
        (COMPRESSED, int8(WEIGHT), {"weight_scale": np.ones((3, 1), np.float16)}, "one or one per row"),
    ],
)
def test_parts_that_disagree_are_refused(
    settings: dict[str, Any], stored: Quantized, change: Tensors, words: str, tmp_path: Path
) -> None:
    tensors = stored.tensors | change
    present = {f"proj.{suffix}": tensor for suffix, tensor in tensors.items() if tensor is not None}
    with pytest.raises(FormatError, match=words):
        HFCheckpoint(folder_of(tmp_path, settings, present))


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="quantization_config is 'gptq', not an object"):
        HFCheckpoint(folder_of(tmp_path, "gptq", {}))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.sampled_from(["", "gptq", "gemm", "int", "-:x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weights", "format"]), inner),
    max_leaves=4,
)


@runs(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        [(GPTQ, gptq(WEIGHT)), (AWQ, awq(WEIGHT)), (FP8, fp8(WEIGHT, block=(32, 64))), (COMPRESSED, packed(WEIGHT))]
    ),
    st.data(),
)
def test_settings_of_any_type_are_read_or_refused(case: tuple[dict[str, Any], Quantized], data: st.DataObject) -> None:
    config, stored = case
    key = data.draw(st.sampled_from([*config, "dynamic", "backend", "sym"]))
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(FormatError, UnsupportedError):
        checkpoint = HFCheckpoint(folder_of(Path(directory), config | {key: data.draw(JUNK)}, named(stored)))
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_empty_weights_are_refused(tmp_path: Path) -> None:
    empty = {"qweight": np.zeros((0, 8), np.int32), "qzeros": np.zeros((0, 1), np.int32)}
    with pytest.raises(FormatError, match="expected a matrix"):
        HFCheckpoint(folder_of(tmp_path, GPTQ, {f"proj.{suffix}": tensor for suffix, tensor in empty.items()}))
