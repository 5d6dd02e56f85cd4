"""Gemma 1 (Gemma Team 2024): a scaled embedding, norms that store weight - 1, wide heads."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, Norm


def spec(config: Config) -> ModelSpec:
    """The network of GemmaForCausalLM."""
    config.require("use_bidirectional_attention", None, False)
    bias, norm = config.flag("attention_bias", False), gemma_norm(config)
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias)
    # The first configs say gelu and meant its approximation.
    config.require("hidden_act", "gelu", "gelu_pytorch_tanh", None)
    layer = LayerSpec(attention, replace(config.mlp(), activation="gelu_tanh"), norm, norm)
    return config.model([layer] * config.num_layers, norm, embedding_scale=config.model_dim**0.5)


def gemma_norm(config: Config) -> Norm:
    """Checkpoints store weight - 1; GGUF's converter adds it."""
    return config.rms_norm(weight_offset=0.0 if config.is_gguf else 1.0)


FAMILY = Family(
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    config_names={"hidden_act": ("hidden_activation", "hidden_act")},
    ignored="hidden_act",
    gguf=Gguf("gemma", GGUF_NAMES),
)
