"""Hugging Face config.json -> its family, and the ModelSpec. Every key is handled, known to be harmless, or refused."""

from collections.abc import Mapping
from typing import Any

from strop.models.config import Config
from strop.models.families import FAMILIES
from strop.models.family import Family
from strop.models.params import check_spec
from strop.models.spec import ModelSpec

_PROVENANCE = """architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path
    transformers.js_config is_llama_config initializer_range use_cache attention_dropout pretraining_tp
    _attn_implementation attn_implementation torchscript _attn_implementation_autoset use_bfloat16
    chunk_size_feed_forward output_attentions output_hidden_states return_dict tf_legacy_loss"""
_TOKENS = "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix"
_GENERATION = """max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"""
_CLASSIFICATION = "id2label label2id num_labels finetuning_task task_specific_params problem_type"
_HARMLESS = frozenset(f"{_PROVENANCE} {_TOKENS} {_GENERATION} {_CLASSIFICATION}".split())
"""Keys that do not change the logits: training, transformers' own code paths, the tokenizer's ids, other heads."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "use_mrope": (False, None),
}
"""Keys that change the mathematics for any value but these."""


def family_from_hf(config: Mapping[str, Any]) -> Family:
    """The family a config names. Raises UnsupportedError for other architectures."""
    named = Config(config)
    architectures = named.get("architectures", [])
    is_one = isinstance(architectures, list) and len(architectures) == 1
    for family in FAMILIES:
        if is_one and architectures[0] in family.architectures:
            named.require("model_type", family.model_type)
            return family
    raise named.refuse(
        "architectures", "one of " + ", ".join(name for known in FAMILIES for name in known.architectures)
    )


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The network that transformers builds from this config.

    Raises UnsupportedError naming the key, its value and what is accepted.
    """
    family = family_from_hf(config)
    read = Config(config, family.config_names, family.defaults)
    read.seen |= _HARMLESS | set(family.ignored.split())
    for key, accepted in _ACCEPTED.items():
        read.require(key, *accepted)
    spec = family.spec(read)
    read.refuse_the_rest("see the supported configs in the documentation")
    return check_spec(spec)
