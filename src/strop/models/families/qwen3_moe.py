"""Qwen3-MoE (Yang et al. 2025): Qwen3 with experts in all layers, or in every n-th."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.families import qwen3
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_EXPERTS_NAMES
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of Qwen3MoeForCausalLM."""
    dense = qwen3.spec(config)
    experts = config.experts(normalise=config.flag("norm_topk_prob", False))
    ffn_dim, step = config.integer("moe_intermediate_size", 768), config.integer("decoder_sparse_step", 1)
    without = config.get("mlp_only_layers", [])
    if not isinstance(without, list) or not all(type(layer) is int for layer in without):
        raise config.refuse("mlp_only_layers", "a list of layers")

    def with_experts(i: int, layer: LayerSpec) -> LayerSpec:
        if i in without or (i + 1) % step:
            return layer
        return replace(layer, mlp=replace(layer.mlp, ffn_dim=ffn_dim), experts=experts)

    return replace(dense, layers=tuple(with_experts(i, layer) for i, layer in enumerate(dense.layers)))


FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    spec=spec,
    names=LLAMA_EXPERTS_NAMES,
    defaults=qwen3.DEFAULTS | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    config_names={"num_experts": ("num_experts", "num_local_experts")},
    gguf=Gguf("qwen3moe", GGUF_NAMES, {"norm_topk_prob": True}, with_experts=True),
)
