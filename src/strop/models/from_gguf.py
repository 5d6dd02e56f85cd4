"""GGUF metadata -> its family, and the ModelSpec. Every `{architecture}.*` key is handled, harmless, or refused.

Meaning of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp where that is silent.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.values import TensorInfo
from strop.models.config import Config, refusal
from strop.models.families import FAMILIES
from strop.models.family import Family, Gguf
from strop.models.params import check_spec
from strop.models.spec import LayerSpec, ModelSpec

_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rotary_dim": "rope.dimension_count",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "use_parallel_residual": "use_parallel_residual",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "norm_topk_prob": "expert_weights_norm",
    "clip_qkv": "attention.clamp_kqv",
    "rope_is_on": "rope.scaling.finetuned",
    "vocab_size": "vocab_size",
}
"""The config's name of a key -> the file's, below the architecture."""

_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0, 8.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "logit_scale": (1.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.sliding_window": (0,),
    "pooling_type": (0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Keys that mean nothing at these values; at others the family has to look at them."""
_OF_WINDOWED_LAYERS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that may stand there again, with `_swa`, for layers with a window: Strop wants the same numbers in all."""
_ACCEPTED_GENERAL: dict[str, tuple[Any, ...]] = {"general.type": ("model",), "general.quantization_version": (2,)}

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors [H // 2] that divide the rotary frequencies: of llama3 scaling, and of longrope."""


def family_from_gguf(metadata: Mapping[str, Any]) -> Family:
    """The family. Raises UnsupportedError for other architectures, adapters and projectors."""
    for key, accepted in _ACCEPTED_GENERAL.items():
        if key in metadata and metadata[key] not in accepted:
            raise refusal(metadata, key, " or ".join(map(repr, accepted)), is_gguf=True)
    for key in metadata:
        if key.startswith("adapter."):
            raise refusal(metadata, key, "a whole model, not an adapter: merge it into its base model", is_gguf=True)
    architecture = metadata.get("general.architecture")
    with_experts = metadata.get(f"{architecture}.expert_count", 0) != 0
    known = [family for family in FAMILIES if family.gguf is not None]
    named = [family for family in known if family.gguf and family.gguf.architecture == architecture]
    found = [family for family in named if family.gguf and family.gguf.with_experts == with_experts]
    if found:
        return found[0]
    if named:
        return named[0]  # which refuses the number of experts
    names = dict.fromkeys(family.gguf.architecture for family in known if family.gguf)
    raise refusal(metadata, "general.architecture", " or ".join(map(repr, names)), is_gguf=True)


def spec_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rope_factors: Mapping[str, np.ndarray] | None = None,
) -> ModelSpec:
    """The network this metadata describes. Biases and an untied head are there if their tensors are.

    `rope_factors` are those of the tensors ROPE_FACTORS that the file has, float32 [H // 2]. Raises UnsupportedError
    naming the key, its value and what is accepted.
    """
    family = family_from_gguf(metadata)
    gguf = family.gguf
    assert gguf is not None
    config = _config(metadata, family, gguf, tensors, rope_factors or {})
    spec = _with_biases_of(family.spec(config), tensors)
    if config.integer("value_length", config.head_dim) != config.head_dim:
        raise config.refuse("value_length", f"the head's length, {config.head_dim}")
    config.refuse_the_rest(f"only {gguf.architecture} keys Strop knows")
    return check_spec(spec)


def _config(
    metadata: Mapping[str, Any],
    family: Family,
    gguf: Gguf,
    tensors: Mapping[str, TensorInfo],
    rope_factors: Mapping[str, np.ndarray],
) -> Config:
    prefix = f"{gguf.architecture}."
    num_layers = metadata.get(f"{prefix}block_count")
    values = {key: _plain(value, num_layers) for key, value in metadata.items() if key.startswith(prefix)}
    pattern = metadata.get(f"{prefix}attention.sliding_window_pattern")
    if isinstance(pattern, list):
        values["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        del values[f"{prefix}attention.sliding_window_pattern"]
    for key, accepted in _ACCEPTED.items():
        if any(_same(values.get(prefix + key), item) for item in accepted):
            del values[prefix + key]
    names = {key: prefix + name for key, name in _KEYS.items()} | {"value_length": prefix + "attention.value_length"}
    for key in _OF_WINDOWED_LAYERS:
        if prefix + key in values and values.get(f"{prefix}{key}_swa") == values[prefix + key]:
            del values[f"{prefix}{key}_swa"]
    given = Config(values, names, is_gguf=True)
    for key, value in gguf.derived(given, tensors).items():
        values[given.name(key)] = value
    implied: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_scaling": _rope_scaling(given, prefix, rope_factors, gguf.yarn_truncates),
        "vocab_size": _vocab_size(metadata, tensors),
        **gguf.config,
    }
    defaults = {key: value for key, value in family.defaults.items() if key not in _KEYS}
    config = Config(values, names, defaults | implied, is_gguf=True)
    config.seen = given.seen | {prefix + key for key in _HARMLESS}
    return config


def _plain(value: Any, num_layers: Any) -> Any:
    """One number for a list of equal ones, a number per layer."""
    is_list = isinstance(value, list) and len(value) == num_layers
    return value[0] if is_list and all(_same(item, value[0]) for item in value) else value


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _vocab_size(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rows of the embedding, or else the tokenizer's size."""
    if embedding := tensors.get("token_embd.weight"):
        return embedding.shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) and tokens else None


def _rope_scaling(
    config: Config, prefix: str, rope_factors: Mapping[str, np.ndarray], yarn_truncates: bool
) -> dict[str, Any] | None:
    """As config.json would have it."""
    keys = f"{prefix}rope.scaling."
    kind = config.get(keys + "type", "linear")
    factor = config.number(keys + "factor", config.number(f"{prefix}rope.scale_linear", 1.0))
    original = config.get(keys + "original_context_length")
    amplitude = config.number(keys + "attn_factor", 1.0)
    yarn = {name: config.get(f"{keys}yarn_{name}") for name in ("beta_fast", "beta_slow")}
    yarn["attention_factor"] = amplitude * _yarn_amplitude(config, keys + "yarn_", factor)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise config.refuse(keys + "type", "'none', 'linear', 'yarn' or 'longrope'")
    for name, factors in rope_factors.items():
        if factors.ndim != 1 or not (np.isfinite(factors) & (factors > 0)).all():
            raise UnsupportedError(f"the tensor {name!r} {factors.shape} holds others than finite numbers above 0")
    found = {name: factors.tolist() for name, factors in rope_factors.items()}
    scaling: dict[str, Any] = {"original_max_position_embeddings": original}
    if ROPE_FACTORS[2] in found:
        sides = {"short_factor": found.get(ROPE_FACTORS[1]), "long_factor": found[ROPE_FACTORS[2]]}
        return scaling | sides | {"rope_type": "longrope", "attention_factor": amplitude}
    if kind == "longrope":
        raise config.refuse(keys + "type", f"'longrope' only with the tensor {ROPE_FACTORS[2]!r}")
    if kind == "yarn":
        return scaling | yarn | {"rope_type": "yarn", "factor": factor, "truncate": yarn_truncates}
    if amplitude != 1.0:
        raise config.refuse(keys + "attn_factor", "1.0")
    factor = 1.0 if kind == "none" else factor
    if ROPE_FACTORS[0] in found:
        return {"rope_type": "factors", "factor": factor, "factors": found[ROPE_FACTORS[0]]}
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn_amplitude(config: Config, keys: str, factor: float) -> float:
    """What the converter found in the model's config, or else what yarn says; less so with a multiplier of the log."""
    if config.has(keys + "attn_factor"):
        return config.number(keys + "attn_factor")
    log = 0.1 * math.log(max(factor, 1.0))
    multiplier = config.get(keys + "log_multiplier") and config.number(keys + "log_multiplier")
    return (1.0 + log) / (1.0 + log * (multiplier or 0.0))


def _with_biases_of(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Metadata does not speak of biases: the tensors of any layer do."""
    present = {name.partition(".")[2].partition(".")[2] for name in tensors if name.startswith("blk.")}

    def with_biases(layer: LayerSpec) -> LayerSpec:
        heads, mlp = layer.attention, layer.mlp
        qkv_bias, out_bias = bool(present & {"attn_q.bias", "attn_qkv.bias"}), "attn_output.bias" in present
        heads = replace(heads, qkv_bias=qkv_bias, out_bias=out_bias)
        mlp = replace(mlp, bias=bool(present & {"ffn_up.bias", "ffn_gate.bias", "ffn_up_exps.bias"}))
        experts = layer.experts and replace(layer.experts, router_bias="ffn_gate_inp.bias" in present)
        return replace(layer, attention=heads, mlp=mlp, experts=experts)

    return replace(spec, layers=tuple(map(with_biases, spec.layers)))
