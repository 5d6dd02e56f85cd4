"""Gemma 2 (Gemma Team 2024): windows in every other layer, norms after each branch, soft caps."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.families.gemma import gemma_norm
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of Gemma2ForCausalLM."""
    config.require("use_bidirectional_attention", None, False)
    bias, norm = config.flag("attention_bias", False), gemma_norm(config)
    soft_cap, logit_soft_cap = (
        config.number(key) if config.has(key) else None for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    scale = config.number("query_pre_attn_scalar", config.head_dim) ** -0.5
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias, scale=scale, soft_cap=soft_cap)
    layer = LayerSpec(attention, config.mlp(), norm, norm, norm, norm)
    windows = config.windows(lambda layer: layer % 2 == 0)
    layers = [replace(layer, attention=replace(attention, window_len=window_len)) for window_len in windows]
    scale = config.model_dim**0.5
    return config.model(layers, norm, embedding_scale=scale, logit_soft_cap=logit_soft_cap)


def gguf_scalar(config: Config, num_layers_27b: int) -> int:
    """What scores are divided by the root of: H, but in the 27B models, which llama.cpp knows by their depth, D / N."""
    if config.num_layers == num_layers_27b:
        return config.model_dim // config.integer("num_attention_heads")
    return config.head_dim


NAMES = LLAMA_NAMES.with_layers(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
FAMILY = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    spec=spec,
    names=NAMES,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    config_names={"hidden_act": "hidden_activation"},
    ignored="hidden_act cache_implementation",
    gguf=Gguf(
        "gemma2",
        GGUF_NAMES,
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        derived=lambda config, tensors: {"query_pre_attn_scalar": gguf_scalar(config, num_layers_27b=46)},
    ),
)
