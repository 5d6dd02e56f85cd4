"""One module per family: data over the one decoder. docs/add-a-family.md says how to write one."""

from strop.models.families import (
    bert,
    bloom,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from strop.models.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (
        bert,
        bloom,
        falcon,
        gemma,
        gemma2,
        gemma3,
        gpt2,
        gpt_bigcode,
        gpt_neox,
        gpt_oss,
        gptj,
        granite,
        llama,
        mistral,
        mixtral,
        olmo2,
        olmoe,
        phi3,
        qwen2,
        qwen3,
        qwen3_moe,
        smollm3,
        stablelm,
        starcoder2,
    )
)
