"""Gemma 3, text (Gemma Team 2025): five layers with a window to one without, each kind with its own rope, QK-norm."""

from strop.models.config import Config
from strop.models.families import gemma2
from strop.models.families.gemma import gemma_norm
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of Gemma3ForCausalLM."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.require(key, None)
    config.require("use_bidirectional_attention", None, False)
    period = config.integer("sliding_window_pattern", 6)
    windows = config.windows(lambda layer: (layer + 1) % period != 0)
    ropes = {
        False: rope(config, layer_type="full_attention"),
        True: rope(config, layer_type="sliding_attention", theta_key="rope_local_base_freq", is_scaled=False),
    }
    bias, norm, mlp = config.flag("attention_bias", False), gemma_norm(config), config.mlp()
    heads = {
        "qkv_bias": bias,
        "out_bias": bias,
        "scale": config.number("query_pre_attn_scalar", config.head_dim) ** -0.5,
        "qk_norm": QkNorm(norm, "head"),
    }
    layers = [
        LayerSpec(
            config.attention(ropes[window_len is not None], window_len=window_len, **heads), mlp, norm, norm, norm, norm
        )
        for window_len in windows
    ]
    return config.model(layers, norm, embedding_scale=config.model_dim**0.5)


FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    spec=spec,
    names=gemma2.NAMES,
    defaults=dict(gemma2.FAMILY.defaults)
    | {
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    config_names={
        "hidden_act": "hidden_activation",
        "sliding_window_pattern": ("sliding_window_pattern", "_sliding_window_pattern"),
    },
    ignored="hidden_act cache_implementation _sliding_window_pattern",
    gguf=Gguf(
        "gemma3",
        GGUF_NAMES,
        derived=lambda config, tensors: {"query_pre_attn_scalar": gemma2.gguf_scalar(config, num_layers_27b=62)},
    ),
)
