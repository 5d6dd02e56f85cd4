"""OLMo 2 (OLMo Team 2024): norms only after each branch, and of all queries and all keys of a token together."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of Olmo2ForCausalLM."""
    bias, norm = config.flag("attention_bias", False), config.rms_norm()
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias, qk_norm=QkNorm(norm, "all_heads"))
    layer = LayerSpec(attention, config.mlp(), None, None, norm, norm)
    return config.model([layer] * config.num_layers, norm)


FAMILY = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(
        attention_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm"
    ),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    gguf=Gguf("olmo2", GGUF_NAMES),
)
