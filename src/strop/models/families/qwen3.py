"""Qwen3 (Yang et al. 2025): Qwen2 with norms of each query and key instead of the biases."""

from strop.models.config import Config
from strop.models.families.qwen2 import windows
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of Qwen3ForCausalLM."""
    position, mlp, norm = rope(config), config.mlp(), config.rms_norm()
    bias = config.flag("attention_bias", False)
    heads = {"qkv_bias": bias, "out_bias": bias, "qk_norm": QkNorm(norm, "head")}
    layers = [
        LayerSpec(config.attention(position, window_len=window_len, **heads), mlp, norm, norm)
        for window_len in windows(config)
    ]
    return config.model(layers, norm)


DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults=DEFAULTS,
    gguf=Gguf("qwen3", GGUF_NAMES),
)
