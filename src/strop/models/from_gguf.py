"""GGUF metadata -> ModelSpec. Every `{architecture}.*` key is handled, known to be harmless, or refused by name.

Meaning of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp where that is silent.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.values import TensorInfo
from strop.models.params import MAX_DIM, MAX_HEAD_DIM, MAX_LAYERS, check_spec
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope

FAMILIES = ("llama", "qwen2")

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor [H // 2] that divides the rotary frequencies (llama3 scaling, computed by the converter)."""

_HARMLESS = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1.0,),
    "pooling_type": (0,),
}
"""Keys that change the mathematics for any value but these."""
_ACCEPTED_GENERAL: dict[str, tuple[Any, ...]] = {"general.type": ("model",), "general.quantization_version": (2,)}


class _Metadata:
    """The `{architecture}.*` keys, and which of them were looked at."""

    def __init__(self, metadata: Mapping[str, Any], family: str) -> None:
        self.prefix = f"{family}."
        self.values = {key: value for key, value in metadata.items() if key.startswith(self.prefix)}
        self.seen = {self.prefix + key for key in _HARMLESS}

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.prefix + key)
        return self.values.get(self.prefix + key, default)

    def refuse(self, key: str, accepted: str) -> UnsupportedError:
        return _refusal(self.values, self.prefix + key, accepted)

    def integer(self, key: str, default: int | None = None, most: int = MAX_DIM) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refuse(key, f"an integer from 1 to {most}")
        return value

    def per_layer(self, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
        """One integer per layer; a single number stands for all layers."""
        value = self.get(key, default)
        values = value if isinstance(value, list) else [value] * num_layers
        if len(values) != num_layers or not all(type(item) is int and 1 <= item <= MAX_DIM for item in values):
            raise self.refuse(key, f"an integer from 1 to {MAX_DIM}, or {num_layers} of them")
        return values

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.refuse(key, "a finite number above 0")
        return float(value)


def _refusal(values: Mapping[str, Any], key: str, accepted: str) -> UnsupportedError:
    shown = repr(values.get(key))
    found = f"has {key}={shown if len(shown) <= 80 else shown[:77] + '...'}" if key in values else f"lacks {key}"
    return UnsupportedError(f"the GGUF file {found}; accepted is {accepted}: Strop cannot run it faithfully")


def _require(values: Mapping[str, Any], key: str, accepted: tuple[Any, ...]) -> None:
    if key in values and not any(
        values[key] == item and isinstance(values[key], bool) == isinstance(item, bool) for item in accepted
    ):
        raise _refusal(values, key, " or ".join(repr(item) for item in accepted))


def family_from_gguf(metadata: Mapping[str, Any]) -> str:
    """The family's name for the name map. Raises UnsupportedError for other architectures, adapters and projectors."""
    for key, accepted in _ACCEPTED_GENERAL.items():
        _require(metadata, key, accepted)
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise _refusal(metadata, "general.architecture", " or ".join(repr(name) for name in FAMILIES))
    for key in metadata:
        if key.startswith("adapter."):
            raise _refusal(metadata, key, "a whole model, not an adapter: merge it into its base model")
    return str(family)


def spec_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], rope_factors: np.ndarray | None = None
) -> ModelSpec:
    """The network this metadata describes. Biases and an untied head are there if their tensors are.

    `rope_factors` is the tensor ROPE_FACTORS, float32 [H // 2], if the file has it. Raises UnsupportedError naming the
    key, its value and what is accepted.
    """
    family = family_from_gguf(metadata)
    keys = _Metadata(metadata, family)
    for key, accepted in _ACCEPTED.items():
        keys.get(key)
        _require(keys.values, keys.prefix + key, accepted)
    model_dim = keys.integer("embedding_length")
    num_layers = keys.integer("block_count", most=MAX_LAYERS)
    num_heads = keys.per_layer("attention.head_count", num_layers)
    num_kv_heads = keys.per_layer("attention.head_count_kv", num_layers, num_heads)
    ffn_dims = keys.per_layer("feed_forward_length", num_layers)
    norm = Norm("rms", keys.number("attention.layer_norm_rms_epsilon"))
    qkv_bias = family == "qwen2" or _any_layer_has(tensors, num_layers, "attn_q.bias")
    out_bias = _any_layer_has(tensors, num_layers, "attn_output.bias")
    mlp_bias = _any_layer_has(tensors, num_layers, "ffn_gate.bias")
    layers = []
    for i in range(num_layers):
        head_dim = _head_dim(keys, model_dim, num_heads[i])
        attention = Attention(
            num_heads=num_heads[i],
            num_kv_heads=num_kv_heads[i],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=_rope(keys, head_dim, rope_factors),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )
        layers.append(LayerSpec(attention, Mlp(ffn_dims[i], "silu", bias=mlp_bias), norm, norm))
    spec = ModelSpec(
        model_dim=model_dim,
        vocab_size=_vocab_size(keys, metadata, tensors),
        layers=tuple(layers),
        final_norm=norm,
        tied_embeddings="output.weight" not in tensors,
        max_context_len=keys.integer("context_length"),
    )
    for key in keys.values:
        if key not in keys.seen:
            raise _refusal(metadata, key, f"only {family} keys Strop knows")
    return check_spec(spec)


def _any_layer_has(tensors: Mapping[str, TensorInfo], num_layers: int, suffix: str) -> bool:
    return any(f"blk.{i}.{suffix}" in tensors for i in range(num_layers))


def _head_dim(keys: _Metadata, model_dim: int, num_heads: int) -> int:
    if keys.get("attention.key_length") is None and model_dim % num_heads:
        raise keys.refuse("attention.head_count", f"a divisor of embedding_length={model_dim}")
    head_dim = keys.integer("attention.key_length", model_dim // num_heads, MAX_HEAD_DIM)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.refuse(key, f"the head's length, {head_dim}")
    return head_dim


def _vocab_size(keys: _Metadata, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    """`vocab_size`, else the tokenizer's size, else the rows of the embedding."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return keys.integer("vocab_size", len(tokens))
    embedding = tensors.get("token_embd.weight")
    return keys.integer("vocab_size", embedding.shape[0] if embedding else None)


def _rope(keys: _Metadata, head_dim: int, factors: np.ndarray | None) -> Rope:
    """Rotary positions; linear scaling and the factors of llama3 scaling fold into one multiplier per frequency."""
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type", "linear")
    legacy_factor = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", legacy_factor)
    keys.get("rope.scaling.original_context_length")  # only yarn and longrope use it
    if kind not in ("none", "linear"):
        raise keys.refuse("rope.scaling.type", "'none' or 'linear'")
    if kind == "none":
        factor = 1.0
    if factors is None:
        return Rope(theta, head_dim, None if factor == 1.0 else (1.0 / factor,) * (head_dim // 2))
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise UnsupportedError(
            f"the tensor {ROPE_FACTORS!r} has shape {factors.shape}; accepted are {head_dim // 2} finite numbers"
            " above 0"
        )
    return Rope(theta, head_dim, tuple(1.0 / (float(item) * factor) for item in factors))
