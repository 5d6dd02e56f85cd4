"""Foreign configs -> ModelSpec: each key is handled, harmless, or refused by name."""

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_configs import LLAMA3_SCALING, QWEN2, SMOLLM2
from tiny_gguf import model_metadata

from strop.core.errors import UnsupportedError
from strop.formats.values import TensorInfo
from strop.models.from_gguf import spec_from_gguf
from strop.models.from_hf import spec_from_hf
from strop.models.reader import spec_from_json, spec_to_json
from strop.models.spec import ModelSpec


def rope_scale(spec: ModelSpec) -> tuple[float, ...] | None:
    rope = spec.layers[0].attention.rope
    assert rope is not None
    return rope.inv_freq_scale


def test_smollm2() -> None:
    spec = spec_from_hf(SMOLLM2)
    assert (spec.model_dim, spec.vocab_size, spec.num_layers, spec.max_context_len) == (576, 49152, 30, 8192)
    assert spec.tied_embeddings
    attention = spec.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.scale) == (9, 3, 64, 0.125)
    assert not attention.qkv_bias
    assert attention.window_len is None
    assert attention.rope is not None
    assert (attention.rope.theta, attention.rope.rotary_dim, attention.rope.inv_freq_scale) == (100000.0, 64, None)
    assert (spec.layers[0].mlp.ffn_dim, spec.final_norm.eps) == (1536, 1e-5)


def test_qwen2() -> None:
    attention = spec_from_hf(QWEN2).layers[0].attention
    assert (attention.qkv_bias, attention.out_bias, attention.window_len, attention.head_dim) == (True, False, None, 64)


def test_biases_head_dim_and_untied_head_of_llama() -> None:
    config = SMOLLM2 | {"attention_bias": True, "mlp_bias": True, "head_dim": 32}
    del config["tie_word_embeddings"]
    spec = spec_from_hf(config)
    attention = spec.layers[0].attention
    assert (attention.qkv_bias, attention.out_bias, attention.head_dim) == (True, True, 32)
    assert spec.layers[0].mlp.bias
    assert not spec.tied_embeddings


def test_qwen2_windows() -> None:
    slides = QWEN2 | {"use_sliding_window": True, "sliding_window": 100}
    windows = [layer.attention.window_len for layer in spec_from_hf(slides).layers]
    assert windows == [None] * 21 + [100] * 3
    kinds = ["sliding_attention", "full_attention"] * 12
    windows = [layer.attention.window_len for layer in spec_from_hf(slides | {"layer_types": kinds}).layers]
    assert windows == [100, None] * 12


def test_rope_scaling_old_and_new_spelling_agree() -> None:
    old = SMOLLM2 | {"rope_scaling": LLAMA3_SCALING}
    new = {key: value for key, value in SMOLLM2.items() if not key.startswith("rope_")}
    new |= {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 100000.0}, "dtype": "float32"}
    assert spec_from_hf(old) == spec_from_hf(new)
    linear = spec_from_hf(SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert rope_scale(linear) == (0.25,) * 32
    assert rope_scale(spec_from_hf(SMOLLM2 | {"rope_scaling": {"rope_type": "default"}})) is None


def test_llama3_scaling_is_the_published_formula() -> None:
    scale = rope_scale(spec_from_hf(SMOLLM2 | {"rope_scaling": LLAMA3_SCALING}))
    assert scale is not None
    inv_freq = 1.0 / 100000.0 ** (np.arange(0, 64, 2) / 64)
    wavelength = 2 * math.pi / inv_freq
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    blended = (1 - smooth) * inv_freq / 32.0 + smooth * inv_freq
    expected = np.where(wavelength > 8192, inv_freq / 32.0, np.where(wavelength < 8192 / 4, inv_freq, blended))
    np.testing.assert_allclose(np.array(scale) * inv_freq, expected, rtol=1e-12)
    assert scale[0] == 1.0
    assert scale[-1] == 1 / 32


COHERE = {
    "architectures": ["CohereForCausalLM"],
    "model_type": "cohere",
    **{key: SMOLLM2[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
    "num_attention_heads": 9,
}


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (SMOLLM2, {"logit_scale": 0.5}, "logit_scale=0.5"),
        (SMOLLM2, {"brand_new_key": None}, "brand_new_key=None"),
        (SMOLLM2, {"architectures": ["MistralForCausalLM"]}, "model_type='llama'.*'mistral'"),
        (SMOLLM2, {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
        (SMOLLM2, {"architectures": None}, "architectures=None"),
        (SMOLLM2, {"architectures": [{}]}, "architectures"),
        (SMOLLM2, {"model_type": "mistral"}, "model_type='mistral'.*'llama'"),
        (SMOLLM2, {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'.*'silu'"),
        (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved=True.*False"),
        (SMOLLM2, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (SMOLLM2, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        (SMOLLM2, {"sliding_window": 4096}, "sliding_window=4096"),
        (SMOLLM2, {"partial_rotary_factor": 1.5}, "rotary_dim=96"),
        (SMOLLM2, {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (SMOLLM2, {"is_encoder_decoder": 0}, "is_encoder_decoder=0"),
        (SMOLLM2, {"hidden_size": "576"}, "hidden_size='576'"),
        (SMOLLM2, {"hidden_size": -1}, "hidden_size=-1"),
        (SMOLLM2, {"hidden_size": 575}, "num_attention_heads=9.*divisor"),
        (SMOLLM2, {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
        (SMOLLM2, {"num_hidden_layers": True}, "num_hidden_layers=True"),
        (SMOLLM2, {"num_key_value_heads": 2}, "num_kv_heads=2.*divisor"),
        (SMOLLM2, {"head_dim": 63}, "rotary_dim=63"),
        (SMOLLM2, {"head_dim": 10**9}, "head_dim=1000000000"),
        (SMOLLM2, {"rms_norm_eps": 0}, "rms_norm_eps=0"),
        (SMOLLM2, {"rope_theta": float("inf")}, "rope_theta=inf"),
        (SMOLLM2, {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        (SMOLLM2, {"rope_scaling": "linear"}, "rope_scaling='linear'"),
        (SMOLLM2, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling.rope_type='ntk'.*'llama3'"),
        (SMOLLM2, {"rope_scaling": {"type": "dynamic"}}, "lacks rope_scaling.factor"),
        (SMOLLM2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "rope_scaling.truncate=1"),
        (SMOLLM2, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 31}}, "rope_scaling.short_factor"),
        (SMOLLM2, {"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        (SMOLLM2, {"rope_scaling": {"type": "linear", "factor": 1e-300}}, "rope scaling"),
        (SMOLLM2, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta=1"),
        (SMOLLM2, {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
        (SMOLLM2, {"rope_scaling": LLAMA3_SCALING | {"type": "linear"}}, "rope_scaling.type='linear'"),
        (SMOLLM2, {"rope_scaling": LLAMA3_SCALING, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        (SMOLLM2, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta=100000"),
        (SMOLLM2, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        (SMOLLM2, {"layer_types": ["sliding_attention"] * 30}, "layer_types"),
        (QWEN2, {"attention_bias": False}, "attention_bias=False"),
        (QWEN2, {"use_mrope": True}, "use_mrope=True"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "layer_types.*use_sliding_window"),
        (QWEN2, {"max_window_layers": "all"}, "max_window_layers='all'"),
    ],
)
def test_hf_keys_that_change_the_mathematics_are_refused(
    config: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    spec_from_hf(config)
    with pytest.raises(UnsupportedError, match=named):
        spec_from_hf(config | changes)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "architectures"]
)
def test_hf_keys_without_a_default_are_asked_for(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"lacks {key}"):
        spec_from_hf({name: value for name, value in SMOLLM2.items() if name != key})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(SMOLLM2 | QWEN2 | {"rope_parameters": 0, "head_dim": 0})), value=JSON)
def test_any_value_of_a_known_key_is_taken_or_refused(key: str, value: Any) -> None:
    for config in (SMOLLM2, QWEN2):
        for changed in (
            config | {key: value},
            config | {key: [value] * 24},
            config | {"rope_scaling": {"type": "linear", "factor": value}},
        ):
            with contextlib.suppress(UnsupportedError):
                spec_from_hf(changed)


def gguf_spec(family: str = "llama", *present: str, factors: np.ndarray | None = None, **changes: Any) -> ModelSpec:
    tensors = {name: TensorInfo(name, (1,), "F32", 4) for name in present}
    rope_factors = {} if factors is None else {"rope_freqs.weight": factors}
    return spec_from_gguf(model_metadata(family, **changes), tensors, rope_factors)


def test_gguf_metadata_describes_the_same_network_as_the_config() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 40,
    }
    # tiny_gguf keeps Python floats; a file would hold the nearest float32
    assert gguf_spec(llama__attention__layer_norm_rms_epsilon=float(np.float32(1e-5))) == spec_from_hf(config)


def test_gguf_biases_and_head_follow_the_tensors() -> None:
    assert gguf_spec("qwen2", "blk.0.attn_qkv.bias").layers[1].attention.qkv_bias
    spec = gguf_spec("llama", "output.weight", "blk.1.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias")
    assert not spec.tied_embeddings
    for layer in spec.layers:
        assert (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) == (True, True, True)


def test_gguf_values_per_layer_and_explicit_head_dim() -> None:
    spec = gguf_spec(llama__feed_forward_length=[96, 96], llama__attention__key_length=32)
    assert [layer.mlp.ffn_dim for layer in spec.layers] == [96, 96]
    assert spec.layers[0].attention.head_dim == 32


def test_gguf_part_of_a_head_may_be_rotated() -> None:
    rope = gguf_spec(llama__rope__dimension_count=8).layers[0].attention.rope
    assert rope is not None
    assert rope.rotary_dim == 8


def test_gguf_yarn_is_that_of_the_config() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = SMOLLM2 | {"rope_scaling": scaling, "rope_theta": 10000.0, "head_dim": 16}
    changes = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    spec = gguf_spec(**{f"llama__rope__scaling__{key}": value for key, value in changes.items()})
    assert spec.layers[0].attention.rope == spec_from_hf(config).layers[0].attention.rope


@pytest.mark.parametrize(
    ("changes", "amplitude"),
    [
        ({"yarn_attn_factor": 1.3}, 1.3),
        ({"yarn_log_multiplier": 1.0}, 1.0),
        ({"yarn_ext_factor": 1.0, "attn_factor": 2.0}, 2 * (0.1 * math.log(4) + 1)),
    ],
)
def test_gguf_amplitude_of_yarn(changes: dict[str, Any], amplitude: float) -> None:
    changes = {"type": "yarn", "factor": 4.0} | changes
    rope = (
        gguf_spec(**{f"llama__rope__scaling__{key}": value for key, value in changes.items()}).layers[0].attention.rope
    )
    assert rope is not None
    assert rope.amplitude == pytest.approx(amplitude)


def gemma_spec(family: str, num_layers: int, **changes: Any) -> ModelSpec:
    depth = {f"{family}__block_count": num_layers, f"{family}__attention__sliding_window": 8}
    return gguf_spec(family, **(depth | changes))


@pytest.mark.parametrize(("family", "depth_27b"), [("gemma2", 46), ("gemma3", 62)])
def test_gguf_gemma_27b_is_known_by_its_depth(family: str, depth_27b: int) -> None:
    wide = {f"{family}__attention__key_length": 64, f"{family}__attention__value_length": 64}
    assert gemma_spec(family, 4, **wide).layers[0].attention.scale == 64**-0.5
    assert gemma_spec(family, depth_27b, **wide).layers[0].attention.scale == 16**-0.5


def test_gguf_gemma2_has_soft_caps_unless_it_says_otherwise() -> None:
    spec = gguf_spec("gemma2")
    assert (spec.layers[0].attention.soft_cap, spec.logit_soft_cap) == (50.0, 30.0)
    assert [layer.attention.window_len for layer in spec.layers] == [4096, None]


def test_gguf_windows_layer_by_layer() -> None:
    spec = gemma_spec("gemma3", 2, gemma3__attention__sliding_window_pattern=[False, True])
    assert [layer.attention.window_len for layer in spec.layers] == [None, 8]
    spec = gemma_spec("gemma3", 2, gemma3__attention__key_length_swa=16, gemma3__attention__key_length=16)
    assert spec.layers[0].attention.head_dim == 16


def test_gguf_stablelm_is_parallel_only_without_the_other_norm() -> None:
    norm = {"layer_norm_epsilon": 1e-5, "layer_norm_rms_epsilon": None}
    claims = {f"stablelm__attention__{key}": value for key, value in norm.items()}
    claims["stablelm__use_parallel_residual"] = True
    assert not gguf_spec("stablelm", "blk.0.ffn_norm.weight", **claims).layers[0].parallel
    spec = gguf_spec("stablelm", "blk.0.attn_q_norm.weight", **claims)
    assert spec.layers[0].parallel
    assert spec.layers[0].attention.qk_norm is not None


def test_gguf_llama_with_experts_is_mixtral() -> None:
    experts = gguf_spec(llama__expert_count=8, llama__expert_used_count=2).layers[0].experts
    assert experts is not None
    assert (experts.num_experts, experts.num_active, experts.normalise) == (8, 2, True)


def test_gguf_rope_scaling() -> None:
    assert rope_scale(gguf_spec(llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)) == (0.5,) * 8
    assert rope_scale(gguf_spec(llama__rope__scale_linear=2.0)) == (0.5,) * 8
    assert rope_scale(gguf_spec(llama__rope__scaling__type="none", llama__rope__scaling__factor=2.0)) is None
    factors = np.array([1, 1, 1, 1, 2, 4, 8, 8], np.float32)
    assert rope_scale(gguf_spec(factors=factors)) == (1, 1, 1, 1, 0.5, 0.25, 0.125, 0.125)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general__architecture": "mamba"}, "general.architecture='mamba'.*'llama'"),
        ({"general__type": "adapter"}, "general.type='adapter'"),
        ({"general__quantization_version": 1}, "general.quantization_version=1"),
        ({"llama__brand_new": 1}, "llama.brand_new=1"),
        ({"llama__expert_count": 8}, "lacks llama.expert_used_count"),
        ({"llama__feed_forward_length": [96, 128]}, "feed_forward_length=.96, 128."),
        ({"llama__attention__sliding_window": 512}, "llama.attention.sliding_window=512"),
        ({"llama__attention__causal": False}, "llama.attention.causal=False"),
        ({"llama__attention__causal": 1}, "llama.attention.causal=1"),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale=0.5"),
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type='longrope'.*rope_factors_long"),
        ({"llama__attention__key_length_swa": 32}, "llama.attention.key_length_swa=32"),
        ({"llama__rope__scaling__type": "ntk"}, "llama.rope.scaling.type='ntk'"),
        ({"llama__rope__scaling__attn_factor": 2.0}, "attn_factor=2.0"),
        ({"llama__rope__dimension_count": 18}, "rotary_dim=18"),
        ({"llama__attention__value_length": 8}, "value_length=8"),
        ({"llama__attention__key_length": 1 << 20}, "key_length=1048576"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__block_count": 2**32 - 1}, "llama.block_count=4294967295"),
        ({"llama__embedding_length": "64"}, "llama.embedding_length='64'"),
        ({"llama__attention__head_count": [4, 4, 4]}, r"head_count=\[4, 4, 4\]"),
        ({"llama__attention__head_count_kv": 3}, "num_kv_heads=3"),
        ({"llama__attention__head_count": 3}, "divisor of llama.embedding_length=64"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "epsilon=nan"),
        ({"llama__context_length": 0}, "context_length=0"),
    ],
)
def test_gguf_keys_that_change_the_mathematics_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        gguf_spec(**changes)


def test_gguf_rope_factors_are_checked() -> None:
    for bad in (np.ones(4, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)):
        with pytest.raises(UnsupportedError, match=r"rope_freqs|factors=\["):
            gguf_spec(factors=bad)


def test_a_spec_survives_json() -> None:
    spec = spec_from_hf(QWEN2 | {"rope_scaling": LLAMA3_SCALING})
    assert spec_from_json(spec_to_json(spec)) == spec
    with pytest.raises(UnsupportedError, match="does not know"):
        spec_from_json(spec_to_json(spec) | {"mixture": 1})
    with pytest.raises(UnsupportedError, match="make it again"):
        spec_from_json(spec_to_json(spec) | {"layers": 3})
    with pytest.raises(UnsupportedError, match="vocab_size=0"):
        spec_from_json(spec_to_json(spec) | {"vocab_size": 0})
