"""Mistral (Jiang et al. 2023): Llama with a window in every layer, at first. Its GGUF files say llama."""

from strop.models.config import Config
from strop.models.family import Family
from strop.models.names import LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of MistralForCausalLM."""
    position, mlp, norm = rope(config), config.mlp(), config.rms_norm()
    layers = [
        LayerSpec(config.attention(position, window_len=window_len), mlp, norm, norm)
        for window_len in config.windows(lambda layer: config.has("sliding_window"))
    ]
    return config.model(layers, norm)


FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
)
