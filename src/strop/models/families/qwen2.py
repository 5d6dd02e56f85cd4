"""Qwen2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of Qwen2ForCausalLM."""
    config.require("attention_bias", True)
    config.require("mlp_bias", False, None)
    position, mlp, norm = rope(config), config.mlp(), config.rms_norm()
    layers = [
        LayerSpec(config.attention(position, qkv_bias=True, window_len=window_len), mlp, norm, norm)
        for window_len in windows(config)
    ]
    return config.model(layers, norm)


def windows(config: Config) -> list[int | None]:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window."""
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise config.refuse("max_window_layers", "an integer, 0 or more")
    if not config.flag("use_sliding_window", False):
        config.no_windows(", since use_sliding_window is false")
        return [None] * config.num_layers
    return config.windows(lambda layer: layer >= first)


FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={"sliding_window": 4096, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    gguf=Gguf("qwen2", GGUF_NAMES),
)
