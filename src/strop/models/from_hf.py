"""Hugging Face config.json -> ModelSpec. Every key is handled, known to be harmless, or refused by name.

Defaults for absent keys are those of transformers' LlamaConfig and Qwen2Config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from strop.core.errors import UnsupportedError
from strop.formats.foreign import kind_of_config
from strop.models.params import MAX_DIM, MAX_HEAD_DIM, MAX_LAYERS, check_spec
from strop.models.spec import Attention, GatedMlp, LayerSpec, ModelSpec, RmsNorm, Rope

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

_PROVENANCE = """transformers_version torch_dtype dtype _name_or_path name_or_path transformers.js_config
    is_llama_config initializer_range use_cache attention_dropout pretraining_tp _attn_implementation
    attn_implementation torchscript _attn_implementation_autoset use_bfloat16 chunk_size_feed_forward output_attentions
    output_hidden_states return_dict tf_legacy_loss"""
_TOKENS = "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix"
_GENERATION = """max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"""
_CLASSIFICATION = "id2label label2id num_labels finetuning_task task_specific_params problem_type"
_HARMLESS = frozenset(f"{_PROVENANCE} {_TOKENS} {_GENERATION} {_CLASSIFICATION}".split())
"""Keys that do not change the logits: training, transformers' own code paths, the tokenizer's ids, other heads."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "partial_rotary_factor": (1.0, None),
    "use_mrope": (False, None),
}
"""Keys that change the mathematics for any value but these."""
_LLAMA_ACCEPTED: dict[str, tuple[Any, ...]] = {"sliding_window": (None,)}
_QWEN2_ACCEPTED: dict[str, tuple[Any, ...]] = {"attention_bias": (True,), "mlp_bias": (False, None)}


@dataclass
class _Config:
    """A config and the keys that were looked at, so that those nobody handles can be refused."""

    values: Mapping[str, Any]
    where: str = ""

    def __post_init__(self) -> None:
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` if the key is absent or null."""
        self.seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, accepted: str) -> UnsupportedError:
        found = f"has {self.where}{key}={self.values[key]!r}" if key in self.values else f"lacks {self.where}{key}"
        return UnsupportedError(f"the model's config {found}; accepted is {accepted}: Strop cannot run it faithfully")

    def integer(self, key: str, default: int | None = None, most: int = MAX_DIM) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refuse(key, f"an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.refuse(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object or null")
        return value

    def require(self, key: str, accepted: tuple[Any, ...]) -> None:
        self.seen.add(key)
        if key in self.values and not any(_same(self.values[key], value) for value in accepted):
            raise self.refuse(key, " or ".join("null" if value is None else repr(value) for value in accepted))

    def refuse_the_rest(self, accepted: str) -> None:
        for key in self.values:
            if key not in self.seen:
                raise self.refuse(key, f"only keys Strop knows ({accepted})")


def _same(left: Any, right: Any) -> bool:
    """Equality that keeps true and 1 apart."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def family_from_hf(config: Mapping[str, Any]) -> str:
    """The family's name for the name map. Raises UnsupportedError for other architectures."""
    checked = _Config(config)
    architectures = checked.get("architectures", [])
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in tuple(FAMILIES):
        if kind := kind_of_config(config):
            raise UnsupportedError(f"the model is {kind}")
        raise checked.refuse("architectures", " or ".join(f"[{name!r}]" for name in FAMILIES))
    family = FAMILIES[architectures[0]]
    checked.require("model_type", (family,))
    return family


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The network that LlamaForCausalLM or Qwen2ForCausalLM builds from this config.

    Raises UnsupportedError naming the key, its value and what is accepted.
    """
    family = family_from_hf(config)
    checked = _Config(config)
    checked.seen |= _HARMLESS | {"architectures", "model_type"}
    for key, accepted in (_ACCEPTED | (_LLAMA_ACCEPTED if family == "llama" else _QWEN2_ACCEPTED)).items():
        checked.require(key, accepted)
    model_dim = checked.integer("hidden_size")
    num_heads = checked.integer("num_attention_heads")
    if config.get("head_dim") is None and model_dim % num_heads:
        raise checked.refuse("num_attention_heads", f"a divisor of hidden_size={model_dim}")
    if family == "qwen2" and "num_key_value_heads" not in config:
        raise checked.refuse("num_key_value_heads", "an explicit number (transformers' default for it is 32)")
    norm = RmsNorm(checked.number("rms_norm_eps", 1e-6))
    max_context_len = checked.integer("max_position_embeddings", 2048 if family == "llama" else 32768)
    num_layers = checked.integer("num_hidden_layers", most=MAX_LAYERS)
    head_dim = checked.integer("head_dim", model_dim // num_heads, MAX_HEAD_DIM)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=checked.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=_rope(checked, head_dim),
        qkv_bias=family == "qwen2" or checked.flag("attention_bias", False),
        out_bias=family == "llama" and checked.flag("attention_bias", False),
    )
    bias = family == "llama" and checked.flag("mlp_bias", False)
    mlp = GatedMlp(checked.integer("intermediate_size"), "silu", bias)
    windows = _windows(checked, family, num_layers)
    spec = ModelSpec(
        model_dim=model_dim,
        vocab_size=checked.integer("vocab_size"),
        layers=tuple(LayerSpec(norm, replace(attention, window_len=window_len), mlp) for window_len in windows),
        final_norm=norm,
        tied_embeddings=checked.flag("tie_word_embeddings", False),
        max_context_len=max_context_len,
    )
    checked.refuse_the_rest("see the supported configs in the documentation")
    return check_spec(spec)


def _windows(checked: _Config, family: str, num_layers: int) -> list[int | None]:
    """Window per layer. Qwen2 slides in layers from `max_window_layers` on, or where `layer_types` says so."""
    kinds = checked.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise checked.refuse("layer_types", f"{num_layers} of 'full_attention' or 'sliding_attention'")
    if family == "llama":
        if kinds and "sliding_attention" in kinds:
            raise checked.refuse("layer_types", "'full_attention' in every layer")
        return [None] * num_layers
    slides = checked.flag("use_sliding_window", False)
    first = checked.get("max_window_layers", 28)
    checked.seen.add("sliding_window")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise checked.refuse("max_window_layers", "an integer, 0 or more")
    if not slides:
        if kinds and "sliding_attention" in kinds:
            raise checked.refuse("layer_types", "'full_attention' in every layer, since use_sliding_window is false")
        return [None] * num_layers
    window_len = checked.integer("sliding_window", 4096)
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return [window_len if kind == "sliding_attention" else None for kind in kinds]


def _rope(checked: _Config, head_dim: int) -> Rope:
    """Rotary positions from `rope_theta` and `rope_scaling`, or `rope_parameters` that joins them (transformers 5)."""
    old, new = checked.table("rope_scaling"), checked.table("rope_parameters")
    if old and new and dict(new) | dict(old) != dict(new):
        raise checked.refuse("rope_scaling", "the same numbers as in rope_parameters")
    key = "rope_parameters" if new else "rope_scaling"
    scaling = _Config(new or old, f"{key}.")
    theta = checked.number("rope_theta", scaling.number("rope_theta", 10000.0))
    if "rope_theta" in checked.values and "rope_theta" in scaling.values and scaling.number("rope_theta") != theta:
        raise checked.refuse("rope_theta", f"the same number as in {key}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    scaling.require("type", (kind, None))
    scaling.require("partial_rotary_factor", (1.0, None))
    match kind:
        case "default":
            scale = None
        case "linear":
            scale = (1.0 / scaling.number("factor"),) * (head_dim // 2)
        case "llama3":
            scale = llama3_inv_freq_scale(
                theta,
                head_dim,
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_context_len=scaling.integer("original_max_position_embeddings"),
            )
        case _:
            accepted = "'default', 'linear' or 'llama3'"
            raise scaling.refuse("rope_type" if "rope_type" in scaling.values else "type", accepted)
    scaling.refuse_the_rest(f"those of rope_type={kind!r}")
    return Rope(theta, head_dim, scale)


def llama3_inv_freq_scale(
    theta: float,
    rotary_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_len: int,
) -> tuple[float, ...]:
    """Multiplier per frequency [rotary_dim // 2] (Llama 3.1; `_compute_llama3_parameters` in transformers).

    Wavelengths above original_context_len / low_freq_factor slow down by `factor`, those below original_context_len /
    high_freq_factor stay, and those between are blended.
    """
    if not low_freq_factor < high_freq_factor:
        raise UnsupportedError(
            f"the model's config has low_freq_factor={low_freq_factor} and high_freq_factor={high_freq_factor};"
            " accepted is the first below the second: check the config"
        )
    scales = []
    for i in range(rotary_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / rotary_dim)
        blend = (original_context_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
        blend = min(1.0, max(0.0, blend))
        scales.append((1 - blend) / factor + blend)
    return tuple(scales)
