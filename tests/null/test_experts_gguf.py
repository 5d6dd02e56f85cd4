"""Mixtures of experts in GGUF files, stacked and named as llama.cpp's converter does it: the model of safetensors."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.hf import HFCheckpoint
from strop.formats.values import GroupQuantized, dense
from strop.models.from_hf import family_from_hf
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ["mixtral-gqa", "olmoe-mha", "gpt-oss-f32"]
Kind = gguf.GGMLQuantizationType


def add_metadata(writer: gguf.GGUFWriter, architecture: str, spec: ModelSpec) -> None:
    layer = spec.layers[0]
    heads, experts = layer.attention, layer.experts
    assert experts is not None
    assert heads.rope is not None
    assert layer.attention_norm is not None
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_context_len)
    writer.add_embedding_length(spec.model_dim)
    writer.add_feed_forward_length(layer.mlp.ffn_dim)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(layer.mlp.ffn_dim)
    writer.add_head_count(heads.num_heads)
    writer.add_head_count_kv(heads.num_kv_heads)
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    writer.add_layer_norm_rms_eps(layer.attention_norm.eps)
    writer.add_rope_freq_base(heads.rope.theta)
    writer.add_rope_dimension_count(heads.rope.rotary_dim)
    writer.add_expert_count(experts.num_experts)
    writer.add_expert_used_count(experts.num_active)
    writer.add_token_list([f"token{i}" for i in range(spec.vocab_size)])
    if architecture == "gpt-oss":
        writer.add_sliding_window(heads.window_len or 0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(512)
        writer.add_rope_scaling_yarn_beta_fast(32.0)
        writer.add_rope_scaling_yarn_beta_slow(1.0)


def converted(path: str, value: np.ndarray, architecture: str, spec: ModelSpec) -> np.ndarray:
    """What the converter of llama models does to queries and keys: (half, j) of a head becomes (j, half)."""
    role, heads = path.rpartition(".")[2], spec.layers[0].attention
    if architecture != "llama" or role not in ("q", "k"):
        return value
    num_heads = heads.num_heads if role == "q" else heads.num_kv_heads
    return value.reshape(num_heads, 2, heads.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)


def as_gguf(folder: Path, path: Path, kind: Kind) -> tuple[ParameterReader, ParameterReader]:
    """The folder's reader, and that of a GGUF file with the same parameters, matrices of rows of 32 quantised."""
    checkpoint = HFCheckpoint(folder)
    reader = ParameterReader(checkpoint, load_spec(checkpoint))
    family = family_from_hf(checkpoint.config).gguf
    assert family is not None
    writer = gguf.GGUFWriter(path, family.architecture)
    add_metadata(writer, family.architecture, reader.spec)
    stacks: dict[str, list[np.ndarray]] = {}
    names = family.names.for_tensors({})
    for parameter, value in reader.read_all():
        row_order = converted(parameter, dense(value), family.architecture, reader.spec)
        stacks.setdefault(names.tensor_name(parameter), []).append(row_order)
    for name, parts in stacks.items():
        values = np.stack(parts) if "_exps" in name else parts[0]
        if values.shape[-1] % 32 or values.ndim == 1 or name.endswith(".bias") or kind == Kind.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = GGUFCheckpoint(path)
    return reader, ParameterReader(written, load_spec(written))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1, Kind.MXFP4], ids=lambda kind: kind.name)
def test_a_gguf_file_is_the_same_model(tmp_path: Path, model: str, kind: Kind) -> None:
    ours, theirs = as_gguf(GOLDEN / model, tmp_path / "model.gguf", kind)
    for one, other in zip(theirs.spec.layers, ours.spec.layers, strict=True):
        assert (one.mlp, one.attention.window_len) == (other.mlp, other.attention.window_len)
        assert one.experts is not None
        assert other.experts is not None
        # Files do not give gpt-oss's limit of gates: it is 7.
        assert one.experts == replace(other.experts, gate_limit=7.0 if one.experts.gate_limit else None)
        assert one.attention.rope is not None
        assert other.attention.rope is not None
        np.testing.assert_allclose(one.attention.rope.inv_freq_scale or 1, other.attention.rope.inv_freq_scale or 1)
        assert one.attention.rope.amplitude == pytest.approx(other.attention.rope.amplitude)
    assert list(theirs.inventory) == list(ours.inventory)
    num_quantized = 0
    for path in ours.inventory:
        found, expected = theirs.read(path), dense(ours.read(path))
        if isinstance(found, GroupQuantized):
            num_quantized += ".experts." in path
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        np.testing.assert_array_equal(dense(found), expected, err_msg=path)
    assert bool(num_quantized) == (kind != Kind.F32)


def mxfp4_file(path: Path, blocks: np.ndarray) -> GGUFCheckpoint:
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_tensor("x", blocks, raw_dtype=Kind.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFCheckpoint(path)


def test_mxfp4_blocks_are_exact(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 4, 17), np.uint8)
    blocks[:, :, 0] = np.arange(24).reshape(6, 4) + 105
    blocks[2, 1] = 0  # a block of zeros has the smallest scale
    raw = blocks.reshape(2, 3, 68)
    checkpoint = mxfp4_file(tmp_path / "model.gguf", raw)
    wanted = gguf.quants.dequantize(raw, Kind.MXFP4)
    np.testing.assert_array_equal(dense(checkpoint.read("x")), wanted.reshape(6, 128))
    np.testing.assert_array_equal(dense(checkpoint.read_part("x", 1)), wanted[1])


def test_mxfp4_scales_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    for exponent in (103, 144):
        blocks = np.full((1, 17), 0x11, np.uint8)
        blocks[0, 0] = exponent
        checkpoint = mxfp4_file(tmp_path / "model.gguf", blocks)
        with pytest.raises(UnsupportedError, match=rf"MXFP4 tensor 'x' has scales from 2\^{exponent - 127} "):
            checkpoint.read("x")


def test_stacks_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    ours, theirs = as_gguf(GOLDEN / "mixtral-gqa", tmp_path / "model.gguf", Kind.F32)
    name = "blk.0.ffn_down_exps.weight"
    info = theirs.checkpoint.tensors[name]
    assert info.shape == (4, 32, 16)
    for shape in ((2, 64, 16), (128, 16), (4, 16, 32)):
        object.__setattr__(info, "shape", shape)
        with pytest.raises(FormatError, match=r"ffn_down_exps.* expected \(4, 32, 16\)"):
            ParameterReader(theirs.checkpoint, ours.spec)
