"""StableLM 2 (Bellagente et al. 2024): layer norm, rotary positions on a quarter of each head."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of StableLmForCausalLM."""
    norm, parallel = config.layer_norm(), config.flag("use_parallel_residual", False)
    qk_norm = QkNorm(config.layer_norm(bias=False), "each_head") if config.flag("qk_layernorm", False) else None
    attention = config.attention(rope(config), qkv_bias=config.flag("use_qkv_bias", False), qk_norm=qk_norm)
    layer = LayerSpec(attention, config.mlp(), norm, None if parallel else norm, parallel=parallel)
    return config.model([layer] * config.num_layers, norm)


FAMILY = Family(
    model_type="stablelm",
    architectures=("StableLmForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(
        **{f"heads.{{e}}.{role}_norm": f"self_attn.{role}_layernorm.norms.{{e}}" for role in ("q", "k")}
    ),
    defaults={"max_position_embeddings": 4096, "partial_rotary_factor": 0.25},
    config_names={"partial_rotary_factor": ("partial_rotary_factor", "rope_pct")},
    ignored="hidden_dropout",
    # Files call models parallel whose configs do not say.
    gguf=Gguf(
        "stablelm",
        GGUF_NAMES,
        derived=lambda config, tensors: {
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        },
    ),
)
