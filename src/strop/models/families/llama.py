"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024), and the many that took its shape."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of LlamaForCausalLM."""
    config.no_windows()
    config.require("sliding_window", None)
    bias = config.flag("attention_bias", False)
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias)
    norm = config.rms_norm()
    layer = LayerSpec(attention, config.mlp(bias=config.flag("mlp_bias", False)), norm, norm)
    return config.model([layer] * config.num_layers, norm)


FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={"max_position_embeddings": 2048},
    gguf=Gguf("llama", GGUF_NAMES.with_adjacent_pairs()),
)
