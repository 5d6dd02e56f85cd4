"""gpt-oss (OpenAI 2025): experts with a clipped gate, attention sinks, windows in every other layer."""

from strop.models.config import Config
from strop.models.family import Family
from strop.models.names import LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GptOssForCausalLM."""
    config.require("hidden_act", "silu")  # of the clipped kind, which the config does not name
    config.require("swiglu_alpha", 1.702)
    config.require("swiglu_limit", 7.0)
    bias, norm, position = config.flag("attention_bias", True), config.rms_norm(), rope(config)
    mlp = config.mlp(bias=True, activation="silu_clipped")
    experts = config.experts(normalise=True, router_bias=True)
    heads = {"qkv_bias": bias, "out_bias": bias, "sinks": True}
    layers = [
        LayerSpec(config.attention(position, window_len=window_len, **heads), mlp, norm, norm, experts=experts)
        for window_len in config.windows(lambda layer: layer % 2 == 0)
    ]
    return config.model(layers, norm)


FAMILY = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(
        sinks="self_attn.sinks",
        router="mlp.router",
        experts_gate="mlp.experts.gate_up_proj",
        experts_up="mlp.experts.gate_up_proj",
        experts_down="mlp.experts.down_proj",
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "num_experts": 128,
        "num_experts_per_tok": 4,
    },
    config_names={
        "num_experts": "num_local_experts",
        "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token"),
    },
    ignored="initial_context_length",
)
