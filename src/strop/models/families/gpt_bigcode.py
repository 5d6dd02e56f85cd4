"""StarCoder 1 (Li et al. 2023): GPT-2 with one key and value head for all queries."""

from dataclasses import replace

from strop.models.config import Config
from strop.models.families import gpt2
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES
from strop.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GPTBigCodeForCausalLM."""
    num_kv_heads = 1 if config.flag("multi_query", True) else config.integer("num_attention_heads")
    config.require("num_key_value_heads", num_kv_heads, None)
    found = gpt2.spec(config)
    heads = replace(found.layers[0].attention, num_kv_heads=num_kv_heads)
    return replace(found, layers=tuple(replace(layer, attention=heads) for layer in found.layers))


FAMILY = Family(
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    spec=spec,
    names=replace(gpt2.FAMILY.names, transposed=(), qkv_by_group=True),
    defaults=gpt2.DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"},
    config_names=gpt2.CONFIG_NAMES,
    ignored=gpt2.IGNORED
    + """ attention_softmax_in_fp32 scale_attention_softmax_in_fp32 inference_runner validate_runner_input
    pre_allocate_kv_cache max_sequence_length max_batch_size pad_key_length""",
    gguf=Gguf(
        "starcoder",
        GGUF_NAMES,
        {"hidden_act": "gelu_pytorch_tanh"},
        derived=lambda config, tensors: {"multi_query": config.get("num_key_value_heads") == 1},
    ),
)
