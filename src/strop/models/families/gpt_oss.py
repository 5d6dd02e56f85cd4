"""gpt-oss (OpenAI 2025): experts with a clipped gate, attention sinks, windows in every other layer."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GptOssForCausalLM."""
    config.require("hidden_act", "silu")  # though it is not
    config.require("swiglu_alpha", 1.702)
    bias, norm, position = config.flag("attention_bias", True), config.rms_norm(), rope(config)
    mlp = config.mlp(bias=True, activation="gelu_sigmoid")
    mlp = replace(mlp, ffn_dim=config.integer("moe_intermediate_size", mlp.ffn_dim))  # GGUF files say both
    experts = config.experts(normalise=True, router_bias=True, gate_limit=config.number("swiglu_limit", 7.0))
    config.require("experts_per_token", experts.num_active)  # published configs say it twice
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
    names=replace(
        LLAMA_NAMES.with_layers(sinks="self_attn.sinks", router="mlp.router").with_stacks(
            gate="mlp.experts.gate_up_proj", up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"
        ),
        transposed=(r"mlp\.experts\.(gate_up|down)_proj",),
        alternating_gates=True,
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
    gguf=Gguf(
        "gpt-oss",
        GGUF_NAMES.with_layers(mlp_norm="post_attention_norm"),
        with_experts=True,
        yarn_truncates=False,
    ),
)
