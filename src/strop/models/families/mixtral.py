"""Mixtral (Jiang et al. 2024): Mistral with eight experts. Its GGUF files say llama."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.families import mistral
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of MixtralForCausalLM."""
    dense, experts = mistral.spec(config), config.experts(normalise=True)
    return replace(dense, layers=tuple(replace(layer, experts=experts) for layer in dense.layers))


_EXPERT = "block_sparse_moe.experts.{e}."
FAMILY = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(
        router="block_sparse_moe.gate",
        experts_gate=_EXPERT + "w1",
        experts_up=_EXPERT + "w3",
        experts_down=_EXPERT + "w2",
    ),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    config_names={"num_experts": "num_local_experts"},
    gguf=Gguf("llama", GGUF_NAMES.with_adjacent_pairs(), {"rope_theta": 10000.0}, with_experts=True),
)
