"""Command R and Aya (Cohere 2024): layer norm without biases, attention and MLP side by side on one, scaled logits."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of CohereForCausalLM. Norms of queries and keys are refused: their weights are not re-ordered."""
    config.require("use_qk_norm", False, None)
    bias, norm = config.flag("attention_bias", False), config.layer_norm(bias=False)
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention, config.mlp(), norm, None, parallel=True)
    model = config.model([layer] * config.num_layers, norm, logit_scale=config.number("logits_scaling", 1.0))
    # The first files say 8192 positions beside the length that the model was trained for.
    return replace(model, max_context_len=config.integer("model_max_length", model.max_context_len))


FAMILY = Family(
    model_type="cohere",
    architectures=("CohereForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_adjacent_pairs(),
    defaults={
        "logits_scaling": 0.0625,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    config_names={"logits_scaling": "logit_scale"},
    gguf=Gguf("command-r", GGUF_NAMES.with_adjacent_pairs()),
)
