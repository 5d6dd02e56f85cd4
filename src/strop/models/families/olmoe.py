"""OLMoE (Muennighoff et al. 2024): many small experts, norms of all queries and of all keys of a token together."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_EXPERTS_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec, QkNorm


def spec(config: Config) -> ModelSpec:
    """The network of OlmoeForCausalLM."""
    config.require("clip_qkv", None)
    bias = config.flag("attention_bias", False)
    norm = config.rms_norm()
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias, qk_norm=QkNorm(norm, "all_heads"))
    experts = config.experts(normalise=config.flag("norm_topk_prob", False))
    layer = LayerSpec(attention, config.mlp(), norm, norm, experts=experts)
    return config.model([layer] * config.num_layers, norm)


FAMILY = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    spec=spec,
    names=LLAMA_EXPERTS_NAMES,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    gguf=Gguf("olmoe", GGUF_NAMES, {"norm_topk_prob": False}, with_experts=True),
)
