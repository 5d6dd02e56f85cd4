"""Command R and R+, Aya (Cohere 2024): layer norm without bias, attention and MLP side by side on it, scaled logits."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of CohereForCausalLM."""
    bias, norm = config.flag("attention_bias", False), config.layer_norm(bias=False)
    qk_norm = QkNorm(norm, "each_head") if config.flag("use_qk_norm", False) else None
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias, qk_norm=qk_norm)
    layer = LayerSpec(attention, config.mlp(), norm, None, parallel=True)
    model = config.model([layer] * config.num_layers, norm, logit_scale=config.number("logits_scaling", 1.0))
    # The first files say 8192 positions beside the length that the model was trained for.
    return replace(model, max_context_len=config.integer("model_max_length", model.max_context_len))


FAMILY = Family(
    model_type="cohere",
    architectures=("CohereForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(
        **{f"heads.{{e}}.{role}_norm": f"self_attn.{role}_norm" for role in ("q", "k")}
    ).with_adjacent_pairs(),
    defaults={
        "logits_scaling": 0.0625,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    config_names={"logits_scaling": "logit_scale"},
    gguf=Gguf(
        "command-r",
        GGUF_NAMES.with_adjacent_pairs(),
        derived=lambda _, tensors: {"use_qk_norm": "blk.0.attn_q_norm.weight" in tensors},
    ),
)
