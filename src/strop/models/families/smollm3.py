"""SmolLM3 (Bakouch et al. 2025): Llama whose every fourth layer has no rotary positions."""

from strop.models.config import Config
from strop.models.families.qwen2 import windows
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of SmolLM3ForCausalLM."""
    num_layers, period = config.num_layers, config.integer("no_rope_layer_interval", 4)
    # Named the wrong way round: 1 has rope.
    with_rope = config.get("no_rope_layers", [int((i + 1) % period != 0) for i in range(num_layers)])
    if not isinstance(with_rope, list) or len(with_rope) != num_layers or any(item not in (0, 1) for item in with_rope):
        raise config.refuse("no_rope_layers", f"{num_layers} of 0 or 1")
    bias = config.flag("attention_bias", False)
    position, mlp, norm = rope(config), config.mlp(bias=config.flag("mlp_bias", False)), config.rms_norm()

    def layer(has_rope: int, window_len: int | None) -> LayerSpec:
        attention = config.attention(
            position if has_rope else None, qkv_bias=bias, out_bias=bias, window_len=window_len
        )
        return LayerSpec(attention, mlp, norm, norm)

    return config.model(list(map(layer, with_rope, windows(config))), norm)


FAMILY = Family(
    model_type="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    gguf=Gguf("smollm3", GGUF_NAMES.with_adjacent_pairs()),
)
