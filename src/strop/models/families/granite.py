"""Granite 3 (Granite Team 2024): Llama with multipliers on embedding, scores, branches and logits."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GraniteForCausalLM."""
    config.require("rope_is_on", True)
    bias, norm = config.flag("attention_bias", False), config.rms_norm()
    scale = config.number("attention_multiplier", 1.0)
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias, scale=scale)
    mlp = config.mlp(bias=config.flag("mlp_bias", False))
    layer = LayerSpec(attention, mlp, norm, norm, residual_scale=config.number("residual_multiplier", 1.0))
    return config.model(
        [layer] * config.num_layers,
        norm,
        embedding_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
    )


FAMILY = Family(
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={"max_position_embeddings": 2048},
    gguf=Gguf("granite", GGUF_NAMES.with_adjacent_pairs()),
)
