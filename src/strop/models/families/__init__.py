"""One module per family: data over the one decoder. docs/add-a-family.md says how to write one."""

from importlib import import_module

from strop.models.family import Family

_MODULES = """bert bloom cohere falcon gemma gemma2 gemma3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite llama mistral
    mixtral olmo2 olmoe phi3 qwen2 qwen3 qwen3_moe smollm3 stablelm starcoder2"""

FAMILIES: tuple[Family, ...] = tuple(import_module(f"{__name__}.{name}").FAMILY for name in _MODULES.split())
