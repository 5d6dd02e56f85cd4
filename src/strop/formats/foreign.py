"""Folders and configs passed by mistake: what they are, and what to do."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_PICKLES = re.compile(r"(?!openvino|training_args|optimizer|scheduler|rng_state)[^/]*\.(bin|pt|pth|ckpt)")
_OTHER_RUNTIMES = {
    "ONNX": re.compile(r"(.*/)?[^/]+\.onnx"),
    "OpenVINO": re.compile(r"(.*/)?openvino[^/]*\.xml"),
    "Flax": re.compile(r"flax_model.*\.msgpack"),
    "TensorFlow": re.compile(r"tf_model.*\.h5"),
    "Core ML": re.compile(r".*\.mlpackage/.*|.*\.mlmodelc/.*"),
}


def kind_of_files(names: Iterable[str]) -> str | None:
    """What a folder without usable weights holds, and the cure; None when nothing tells. `names` may have '/'."""
    names = set(names)
    if "adapter_config.json" in names:
        return (
            "a LoRA adapter, not a whole model: merge it into its base model (`merge_and_unload` in peft) and save that"
        )
    if "model_index.json" in names:
        return "a diffusion pipeline, which makes images: pass a language model"
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return (
            "a model in its maker's own layout (params.json, consolidated.*): use its version in Hugging Face's layout,"
            " with config.json and model.safetensors, or a GGUF file"
        )
    pickles = sorted(name for name in names if _PICKLES.fullmatch(name))
    if pickles:
        return (
            f"only pickled weights ({some_of(pickles)}), which can run any code when opened: convert them with"
            " `save_pretrained(..., safe_serialization=True)` in transformers, or fetch a safetensors version"
        )
    for runtime, pattern in _OTHER_RUNTIMES.items():
        if any(pattern.fullmatch(name) for name in names):
            return f"weights for {runtime} only: use the model's safetensors version, or a GGUF file"
    if "config.json" not in names and names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}:
        return "only a tokenizer: download the model's config.json and weights as well"
    return None


def kind_of_config(config: Mapping[str, Any]) -> str | None:
    """What a config describes that is no language model for Strop, and the cure; None when nothing tells."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "of an unknown type"))
    if config.get("is_encoder_decoder") is True:
        if "num_mel_bins" in config:
            return f"a speech recogniser ({name}): pass a language model"
        return (
            f"an encoder-decoder ({name}), which reads a whole source text before it writes: pass a decoder-only model,"
            " such as a Llama or a Qwen"
        )
    for key, sense in (("vision_config", "sees"), ("audio_config", "hears")):
        if config.get(key):
            return (
                f"a model that also {sense} ({name}): use its text-only version, or a GGUF file of it, which holds the"
                " text model alone"
            )
    if "image_size" in config or "num_channels" in config:
        return f"an image model ({name}): pass a language model"
    head = re.search(
        r"For(SequenceClassification|TokenClassification|QuestionAnswering|MaskedLM|MultipleChoice)$", name
    )
    if head is not None:
        return f"a model with a head for {head[1]} ({name}), which writes no text: pass one that ends in ForCausalLM"
    return None


def some_of(names: list[str], limit: int = 5) -> str:
    """The first names, in quotes, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
