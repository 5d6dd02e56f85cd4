"""Writes a model of transformers as a GGUF file, with the names, row orders and keys of llama.cpp's converter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from strop.formats.hf import HFCheckpoint
from strop.formats.values import dense
from strop.models.spec import LayerSpec, ModelSpec

_DIMS = "block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv"
_HEAD = " attention.key_length attention.value_length"
_RMS = f"{_DIMS} attention.layer_norm_rms_epsilon rope.freq_base"
_LAYER = f"{_DIMS} attention.layer_norm_epsilon"
_LLAMA = f"{_RMS} vocab_size rope.dimension_count rope.scaling"
_EXPERTS = " expert_count expert_used_count"
KEYS = {
    "bloom": _LAYER,
    "command-r": f"{_LAYER} rope.freq_base rope.scaling.type logit_scale",
    "falcon": f"{_LAYER} tensor_data_layout rope.freq_base",
    "gemma": _RMS + _HEAD,
    "gemma2": f"{_RMS}{_HEAD} attn_logit_softcapping final_logit_softcapping attention.sliding_window",
    "gemma3": f"{_RMS}{_HEAD} attention.sliding_window rope.freq_base_swa rope.scaling"
    " attention.sliding_window_pattern",
    "gpt2": _LAYER,
    "gptneox": f"{_LAYER} rope.dimension_count use_parallel_residual rope.freq_base",
    "gpt-oss": f"{_RMS}{_HEAD}{_EXPERTS} attention.sliding_window expert_feed_forward_length rope.scaling",
    "granite": f"{_LLAMA} attention.scale embedding_scale residual_scale logit_scale",
    "llama": _LLAMA + _HEAD + _EXPERTS,
    "olmo2": _RMS,
    "olmoe": _RMS + _EXPERTS,
    "phi3": f"{_RMS} rope.dimension_count attention.sliding_window rope.longrope",
    "qwen2": _RMS,
    "qwen3": f"{_RMS}{_HEAD} rope.scaling",
    "qwen3moe": f"{_RMS}{_HEAD}{_EXPERTS} expert_feed_forward_length",
    "smollm3": _LLAMA,
    "stablelm": f"{_LAYER} rope.dimension_count use_parallel_residual",
    "starcoder": _LAYER,
    "starcoder2": f"{_RMS} attention.layer_norm_epsilon",
}
"""What the converter writes, by architecture, where the model has it."""
MASKS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")
JOINED = {
    "attn_qkv.": (("attn_q.", "attn_k.", "attn_v."), 0),
    "ffn_gate_up_exps.": (("ffn_gate_exps.", "ffn_up_exps."), 1),
}
"""A tensor -> those that it may have along an axis."""


def known_keys(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values for all of KEYS; None for what the model does not have."""
    first, last = spec.layers[0], spec.layers[-1]
    heads, experts, norm = first.attention, first.experts or last.experts, spec.final_norm
    rope = next((layer.attention.rope for layer in spec.layers[::-1] if layer.attention.rope), None)
    windows = [layer.attention.window_len for layer in spec.layers]
    dense_layer = next((layer for layer in spec.layers if not layer.experts), first)
    assert norm is not None
    keys = {
        "block_count": spec.num_layers,
        "context_length": spec.max_context_len,
        "embedding_length": spec.model_dim,
        "feed_forward_length": dense_layer.mlp.ffn_dim,
        "attention.head_count": heads.num_heads,
        "attention.head_count_kv": heads.num_kv_heads,
        "attention.key_length": heads.head_dim,
        "attention.value_length": heads.head_dim,
        "attention.layer_norm_rms_epsilon": norm.eps if norm.kind == "rms" else None,
        "attention.layer_norm_epsilon": norm.eps if norm.kind == "layer" else None,
        "attention.sliding_window": next((window_len for window_len in windows if window_len), None),
        "attention.sliding_window_pattern": [window_len is not None for window_len in windows],
        "attention.scale": heads.scale,
        "vocab_size": spec.vocab_size,
        "tensor_data_layout": "jploski",
        "use_parallel_residual": first.parallel
        or config["model_type"] == "stablelm",  # said of all that do not deny it
        "attn_logit_softcapping": heads.soft_cap,
        "final_logit_softcapping": spec.logit_soft_cap,
        "rope.scaling.type": "none",  # where the converter says nothing of stretched contexts
        "embedding_scale": spec.embedding_scale,
        "residual_scale": first.residual_scale,
        "logit_scale": spec.logit_scale if config["model_type"] == "cohere" else 1 / spec.logit_scale,
    }
    if experts:
        of_experts = next(layer for layer in spec.layers if layer.experts).mlp
        keys |= {"expert_count": experts.num_experts, "expert_used_count": experts.num_active}
        keys |= {"expert_feed_forward_length": of_experts.ffn_dim}
    if rope:
        keys |= {"rope.freq_base": rope.theta, "rope.dimension_count": rope.rotary_dim}
        keys["rope.freq_base_swa"] = heads.rope.theta if heads.rope else None
    return keys


def rope_scaling(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a stretched context."""
    scaling = config.get("rope_parameters", {})
    scaling = scaling.get("full_attention", scaling)
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "attention_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return {}
    return {"type": scaling["rope_type"]} | {names[key]: value for key, value in scaling.items() if key in names}


def metadata(architecture: str, spec: ModelSpec, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The file's keys below the architecture."""
    known = known_keys(spec, config)
    for key in KEYS[architecture].split():
        if key == "rope.scaling":
            yield from ((f"rope.scaling.{name}", value) for name, value in rope_scaling(spec, config).items())
        elif key == "rope.longrope":
            rope = spec.layers[0].attention.rope
            assert rope is not None
            yield "rope.scaling.original_context_length", rope.original_context_len or spec.max_context_len
            if rope.long_inv_freq_scale:
                yield "rope.scaling.attn_factor", rope.amplitude
        elif known.get(key) is not None:
            yield key, known[key]


def halves_to_pairs(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (half, j) of each head become (j, half)."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def groups_to_parts(values: np.ndarray, num_kv_heads: int, head_dim: int) -> np.ndarray:
    """Rows of queries, key and value group by group become all queries, all keys, all values."""
    groups = values.reshape(num_kv_heads, -1, head_dim, *values.shape[1:])
    parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])


def converted(architecture: str, name: str, values: np.ndarray, layer: LayerSpec) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor as the converter has it, still under the name that transformers gives it."""
    heads = layer.attention
    if architecture in ("llama", "granite", "smollm3"):
        for end, num_heads in (("q_proj", heads.num_heads), ("k_proj", heads.num_kv_heads)):
            if f"{end}." in name:
                values = halves_to_pairs(values, num_heads)
    elif architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    elif architecture in ("bloom", "falcon", "gptneox") and "query_key_value" in name:
        values = groups_to_parts(values, heads.num_kv_heads, heads.head_dim)
    elif architecture == "gpt2" and ".c_" in name and name.endswith(".weight"):
        values = values.T
    elif architecture == "gpt-oss" and ".experts." in name:
        stem, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        values, end = (values, ".bias") if is_bias else (values.swapaxes(1, 2), ".weight")
        for i, part in enumerate(("gate_proj", "up_proj") if "gate_up" in stem else ()):
            yield stem.replace("gate_up_proj", part) + end, values[:, i::2]
        if "gate_up" in stem:
            return
        name = stem + end
    elif name.endswith("sinks"):
        name += ".weight"
    yield name, np.ascontiguousarray(values)


def file_tensors(architecture: str, spec: ModelSpec, checkpoint: HFCheckpoint) -> dict[str, np.ndarray]:
    """All tensors of the file: renamed, converted, those of experts and heads stacked."""
    kind = gguf.MODEL_ARCH[architecture.upper().replace("-", "_")]
    maps = [gguf.get_tensor_name_map(kind, spec.num_layers) for kind in (kind, gguf.MODEL_ARCH.LLAMA)]
    stacks: dict[str, list[np.ndarray]] = {}
    for stored in checkpoint.tensors:
        if stored.endswith(MASKS) or (spec.tied_embeddings and stored == "lm_head.weight"):
            continue
        numbers = [int(part) for part in stored.split(".") if part.isdecimal()]
        layer = spec.layers[numbers[0] if numbers else 0]
        for name, values in converted(architecture, stored, dense(checkpoint.read(stored)), layer):
            name = name.replace(f".experts.{numbers[-1]}.", ".experts.") if len(numbers) > 1 else name
            name = name.replace(f".norms.{numbers[-1]}.", ".") if len(numbers) > 1 else name
            name = name.removeprefix("transformer.") if architecture == "bloom" else name
            found = next(filter(None, (names.get_name(name, try_suffixes=(".weight", ".bias")) for names in maps)))
            stacks.setdefault(found, []).append(values)
    tensors = {name: np.stack(parts) if len(parts) > 1 else parts[0] for name, parts in stacks.items()}
    rope = spec.layers[-1].attention.rope
    if rope and rope.long_inv_freq_scale and architecture == "phi3":
        tensors["rope_factors_long.weight"] = 1 / np.float32(rope.long_inv_freq_scale)
        tensors["rope_factors_short.weight"] = 1 / np.float32(rope.inv_freq_scale or ())
    if checkpoint.config.get("rope_parameters", {}).get("rope_type") == "llama3":
        assert rope is not None
        tensors["rope_freqs.weight"] = 1 / np.float32(rope.inv_freq_scale or ())
    return tensors


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by a converter that was asked to join q, k and v, and the gates of experts with the rest."""
    joined = dict(tensors)
    for name in tensors:
        for whole, (parts, axis) in JOINED.items():
            if parts[0] in name:
                found = [joined.pop(name.replace(parts[0], part)) for part in parts]
                joined[name.replace(parts[0], whole)] = np.concatenate(found, axis)
    return joined


def write_file(path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        (writer.add_array if isinstance(value, list) else add[type(value)])(f"{architecture}.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
