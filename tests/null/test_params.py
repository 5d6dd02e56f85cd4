"""Inventory, and the reader that maps any checkpoint onto it: names, row order, shapes, numbers."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from published_configs import SMOLLM2
from safetensors.numpy import save_file
from tiny_gguf import RawGGUF, RawTensor, model_metadata, random_tensor, tiny_model, value

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.hf import HFCheckpoint
from strop.formats.values import GroupQuantized, dense
from strop.models.from_hf import family_from_hf, spec_from_hf
from strop.models.params import inventory
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm

LAYER_ROLES = ["attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"]


def open_gguf(directory: Path, raw: RawGGUF) -> ParameterReader:
    path = directory / "model.gguf"
    path.write_bytes(raw.build())
    checkpoint = GGUFCheckpoint(path)
    return ParameterReader(checkpoint, load_spec(checkpoint))


TINY_HF = SMOLLM2 | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 40,
}


def hf_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (40, 64),
        "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def open_hf(directory: Path, tensors: dict[str, np.ndarray], **changes: Any) -> ParameterReader:
    (directory / "config.json").write_text(json.dumps(TINY_HF | changes))
    save_file(tensors, directory / "model.safetensors")
    checkpoint = HFCheckpoint(directory)
    return ParameterReader(checkpoint, load_spec(checkpoint))


def test_inventory_lists_what_the_spec_has() -> None:
    norm = Norm("rms", 1e-5)
    plain = LayerSpec(Attention(4, 2, 16, 0.25, None), Mlp(96, "silu"), norm, norm)
    biased = LayerSpec(
        Attention(4, 2, 16, 0.25, None, qkv_bias=True, out_bias=True), Mlp(96, "silu", bias=True), norm, norm
    )
    params = inventory(ModelSpec(48, 40, (plain, biased), norm, False, 128))
    biases = ["q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias"]
    expected = ["embed", "final_norm", "head", *(f"layers.0.{role}" for role in LAYER_ROLES)]
    assert sorted(params) == sorted(expected + [f"layers.1.{role}" for role in LAYER_ROLES + biases])
    assert (params["embed"].shape, params["embed"].axes) == ((40, 48), ("V", "D"))
    assert (params["layers.0.q"].shape, params["layers.0.q"].axes) == ((64, 48), ("N*H", "D"))
    assert (params["layers.0.v"].shape, params["layers.0.v"].axes) == ((32, 48), ("K*H", "D"))
    assert (params["layers.0.o"].shape, params["layers.0.o"].axes) == ((48, 64), ("D", "N*H"))
    assert (params["layers.0.down"].shape, params["layers.0.down"].axes) == ((48, 96), ("D", "F"))
    assert (params["layers.1.k_bias"].shape, params["layers.1.up_bias"].axes) == ((32,), ("F",))
    tied = inventory(ModelSpec(48, 40, (plain,), norm, True, 128))
    assert "head" not in tied


def test_hf_parameters_come_through_unchanged(tmp_path: Path) -> None:
    tensors = hf_tensors()
    reader = open_hf(tmp_path, tensors)
    values = dict(reader.read_all())
    assert list(values) == list(reader.inventory)
    np.testing.assert_array_equal(dense(values["layers.0.k"]), tensors["model.layers.0.self_attn.k_proj.weight"])
    np.testing.assert_array_equal(
        dense(values["layers.0.mlp_norm"]), tensors["model.layers.0.post_attention_layernorm.weight"]
    )


def converter_permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of llama models, from its documentation: (half, j) -> (j, half)."""
    head_dim = weights.shape[0] // num_heads
    out = np.empty_like(weights)
    for head in range(num_heads):
        for half in range(2):
            for j in range(head_dim // 2):
                out[head * head_dim + 2 * j + half] = weights[head * head_dim + half * head_dim // 2 + j]
    return out


@pytest.mark.parametrize("weights", ["F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_llama_gguf_rows_are_put_back(tmp_path: Path, weights: str) -> None:
    reader = open_gguf(tmp_path, tiny_model(weights=weights))
    for role, num_heads in (("q", 4), ("k", 2)):
        ours = reader.read(f"layers.1.{role}")
        stored = dense(reader.checkpoint.read(f"blk.1.attn_{role}.weight"))
        assert isinstance(ours, GroupQuantized) == weights.startswith("Q")
        np.testing.assert_array_equal(converter_permute(dense(ours), num_heads), stored)
    np.testing.assert_array_equal(
        dense(reader.read("layers.1.v")), dense(reader.checkpoint.read("blk.1.attn_v.weight"))
    )


def test_llama_gguf_biases_of_q_and_k_are_put_back_too(tmp_path: Path) -> None:
    raw = tiny_model()
    raw.tensors = [*raw.tensors]
    for i in range(2):
        for role, length in (("q", 64), ("k", 32), ("v", 32)):
            raw.tensors.append(random_tensor(f"blk.{i}.attn_{role}.bias", (length,), "F32"))
    reader = open_gguf(tmp_path, raw)
    stored = dense(reader.checkpoint.read("blk.0.attn_k.bias"))
    np.testing.assert_array_equal(converter_permute(dense(reader.read("layers.0.k_bias")), 2), stored)
    np.testing.assert_array_equal(
        dense(reader.read("layers.0.v_bias")), dense(reader.checkpoint.read("blk.0.attn_v.bias"))
    )


def test_qwen2_gguf_rows_stay(tmp_path: Path) -> None:
    reader = open_gguf(tmp_path, tiny_model("qwen2"))
    for role in ("q", "k"):
        stored = dense(reader.checkpoint.read(f"blk.0.attn_{role}.weight"))
        np.testing.assert_array_equal(dense(reader.read(f"layers.0.{role}")), stored)
        assert dense(reader.read(f"layers.0.{role}_bias")).shape == stored.shape[:1]


def test_untied_head(tmp_path: Path) -> None:
    assert open_gguf(tmp_path, tiny_model(tied=False)).read("head").shape == (40, 64)


def drop(raw: RawGGUF, *names: str) -> RawGGUF:
    raw.tensors = [tensor for tensor in raw.tensors if tensor.name not in names]
    return raw


def replace(raw: RawGGUF, new: RawTensor) -> RawGGUF:
    raw.tensors = [new if tensor.name == new.name else tensor for tensor in raw.tensors]
    return raw


GOLDEN = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").glob("*/config.json"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_names_agree_with_the_gguf_package(folder: Path) -> None:
    checkpoint = HFCheckpoint(folder)
    family = family_from_hf(checkpoint.config)
    if family.gguf is None:
        return
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.gguf.architecture]
    table = gguf.get_tensor_name_map(arch, 3)
    reader = ParameterReader(checkpoint, load_spec(checkpoint))
    for path in reader.inventory:
        expected = table.get_name(reader.tensor_name(path), (".weight", ".bias"))
        # A tensor that the converter makes of several, or splits, has no name of its own in that table.
        if expected is not None and not re.match(r"layers\.[1-9]", path):
            assert family.gguf.names.for_tensors({expected: None}).tensor_name(path) == expected


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_every_golden_folder_loads_whichever_transformers_wrote_its_config(folder: Path) -> None:
    checkpoint = HFCheckpoint(folder)
    reader = ParameterReader(checkpoint, load_spec(checkpoint))
    assert [path for path, _ in reader.read_all()] == list(reader.inventory)
    legacy = json.loads((folder / "config_legacy.json").read_text())
    spec = spec_from_hf(legacy)
    if "max_position_embeddings" not in checkpoint.config.keys() & legacy.keys():  # what needs no limit may not say it
        spec = dataclasses.replace(spec, max_context_len=reader.spec.max_context_len)
    assert spec == reader.spec


def test_all_missing_tensors_are_named(tmp_path: Path) -> None:
    raw = drop(tiny_model(), "blk.1.ffn_up.weight", "output_norm.weight")
    with pytest.raises(FormatError, match=r"missing: blk\.1\.ffn_up\.weight, output_norm\.weight"):
        open_gguf(tmp_path, raw)
    tensors = hf_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(FormatError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        open_hf(tmp_path, tensors)


def test_a_bias_missing_in_one_layer_is_named(tmp_path: Path) -> None:
    raw = drop(tiny_model("qwen2"), "blk.1.attn_k.bias")
    with pytest.raises(FormatError, match=r"missing: blk\.1\.attn_k\.bias"):
        open_gguf(tmp_path, raw)


def test_unexpected_tensors_are_named_and_harmless_ones_are_not(tmp_path: Path) -> None:
    raw = tiny_model()
    raw.tensors = [*raw.tensors, random_tensor("blk.0.attn_q_norm.weight", (16,), "F32")]
    with pytest.raises(UnsupportedError, match=r"does not have: blk\.0\.attn_q_norm\.weight"):
        open_gguf(tmp_path, raw)
    raw = tiny_model()
    raw.tensors = [*raw.tensors, RawTensor("rope_freqs.weight", (8,), 0, np.full(8, 2.0, "<f4").tobytes())]
    rope = open_gguf(tmp_path, raw).spec.layers[0].attention.rope
    assert rope is not None
    assert rope.inv_freq_scale == (0.5,) * 8
    open_hf(tmp_path, hf_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    with pytest.raises(UnsupportedError, match=r"does not have: score\.weight"):
        open_hf(tmp_path, hf_tensors() | {"score.weight": np.ones(8, np.float32)})


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    tensors = hf_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reader = open_hf(tmp_path, tensors)
    assert "head" not in reader.inventory
    with pytest.raises(UnsupportedError, match=r"'lm_head\.weight'.*differ"):
        open_hf(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    raw = replace(tiny_model(), random_tensor("blk.1.attn_k.weight", (64, 64), "Q4_1"))
    with pytest.raises(
        FormatError, match=r"'blk.1.attn_k.weight' has shape \(64, 64\), expected \(32, 64\) \(K\*H x D\)"
    ):
        open_gguf(tmp_path, raw)
    with pytest.raises(FormatError, match=r"'model.norm.weight' has shape \(63,\), expected \(64,\)"):
        open_hf(tmp_path, hf_tensors() | {"model.norm.weight": np.ones(63, np.float32)})
    metadata = model_metadata() | {"llama.vocab_size": 41}
    with pytest.raises(FormatError, match=r"'token_embd.weight' has shape \(40, 64\), expected \(41, 64\)"):
        open_gguf(tmp_path, tiny_model(metadata=metadata))


def test_wrong_dtypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'model.norm.weight' has dtype I32"):
        open_hf(tmp_path, hf_tensors() | {"model.norm.weight": np.ones(64, np.int32)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    norm = np.ones(64, np.float32)
    norm[3] = bad
    reader = open_hf(tmp_path, hf_tensors() | {"model.norm.weight": norm})
    with pytest.raises(FormatError, match=r"'model.norm.weight' holds NaN or infinity"):
        reader.read("final_norm")
    raw = tiny_model()
    for name, place in (("blk.0.attn_q.weight", 0), ("blk.0.attn_v.weight", 2)):  # a scale, an offset
        tensor = next(tensor for tensor in raw.tensors if tensor.name == name)
        tensor.data = tensor.data[:place] + np.float16(bad).tobytes() + tensor.data[place + 2 :]
    reader = open_gguf(tmp_path, raw)
    for role in ("q", "v"):
        with pytest.raises(FormatError, match=rf"'blk.0.attn_{role}.weight' holds NaN or infinity"):
            reader.read(f"layers.0.{role}")
    reader.read("layers.0.k")


def test_an_adapter_is_refused_before_its_tensors_are_judged(tmp_path: Path) -> None:
    raw = RawGGUF([(key, value(item)) for key, item in model_metadata(general__type="adapter").items()])
    with pytest.raises(UnsupportedError, match=r"general\.type='adapter'"):
        open_gguf(tmp_path, raw)
