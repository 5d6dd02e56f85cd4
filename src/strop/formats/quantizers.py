"""Which quantisers' weights Strop reads from Hugging Face folders, and what to do about the others."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.awq import awq_weights
from strop.formats.compressed_tensors import compressed_weights
from strop.formats.fp8 import fp8_weights
from strop.formats.gptq import gptq_weights
from strop.formats.quantized import CURE, Quantizer, StoredWeight, TensorSource, is_of_activations

log = logging.getLogger(__name__)

QUANTIZERS: Mapping[str, Quantizer] = {
    "gptq": gptq_weights,
    "awq": awq_weights,
    "fp8": fp8_weights,
    "fbgemm_fp8": fp8_weights,
    "compressed-tensors": compressed_weights,
}
_CURES = {
    "bitsandbytes": "load it in transformers, `dequantize()` it and save that, or",
    "mxfp4": "take the model's GGUF file or a bfloat16 version, or",
}


class QuantizedTensors:
    """The tensors of a source, with those that hold a quantised weight put together under the weight's own name."""

    def __init__(
        self, config: Mapping[str, Any], settings_files: Mapping[str, Mapping[str, Any]], source: TensorSource
    ):
        """`settings_files` are the settings by file name that old quantisers write beside config.json.

        Raises UnsupportedError for a quantiser, or settings of one, that Strop does not read.
        """
        self._source = source
        self._weights = {weight.info.name: weight for weight in _weights(config, settings_files, source)}
        self._modules = {name.removesuffix(".weight") for name in self._weights}
        taken = {part for weight in self._weights.values() for part in weight.parts}
        plain = {
            name: info
            for name, info in source.tensors.items()
            if name not in taken and not (self._weights and is_of_activations(name))
        }
        if both := [name for name in self._weights if name in plain]:
            raise FormatError(
                f"{source.path}: the weight {both[0]!r} is there twice, quantised and not; download it again"
            )
        self.tensors = plain | {name: weight.info for name, weight in self._weights.items()}

    def weight(self, name: str) -> StoredWeight | None:
        """The quantised weight of this name; None for a plain tensor."""
        return self._weights.get(name)

    def is_empty_bias(self, name: str) -> bool:
        """Whether it is a bias of zeros beside a quantised weight: AutoGPTQ writes one for every module."""
        return (
            name.endswith(".bias") and name.removesuffix(".bias") in self._modules and not self._source.read(name).any()
        )


def refuse_unknown_quantizer(config: Mapping[str, Any], where: Path | str) -> None:
    """Raises UnsupportedError for a model quantised by what Strop does not read, FormatError for bad settings."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        _method(settings, where)


def _weights(
    config: Mapping[str, Any], settings_files: Mapping[str, Mapping[str, Any]], source: TensorSource
) -> list[StoredWeight]:
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings and any(name.endswith(".qweight") for name in source.tensors):
        settings = _settings_beside(settings_files, source.path)
    if not settings:
        return []
    method = _method(settings, source.path)
    weights = QUANTIZERS[method](settings, source)
    for loss, count in Counter(weight.loss for weight in weights if weight.loss).items():
        log.warning("%s: %d of %d %s weights %s", source.path, count, len(weights), method, loss)
    return weights


def _method(settings: Any, where: Path | str) -> str:
    if not isinstance(settings, dict):
        raise FormatError(
            f"{where}: config.json's quantization_config is {settings!r}, not an object; download it again"
        )
    by_flag = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(settings) else "an unknown quantiser"
    method = settings.get("quant_method", by_flag)
    if not isinstance(method, str) or method not in QUANTIZERS:
        cure = _CURES.get(str(method), "")
        raise UnsupportedError(
            f"{where}: quantised by {method!r}; of quantised models Strop reads GGUF files and"
            f" {', '.join(QUANTIZERS)}: {f'{cure} ' if cure else ''}{CURE}"
        )
    return method


def _settings_beside(files: Mapping[str, Mapping[str, Any]], path: Path) -> Mapping[str, Any]:
    """AutoGPTQ's quantize_config.json or AutoAWQ's quant_config.json."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if name in files:
            return {"quant_method": method, **files[name]}
    raise UnsupportedError(
        f"{path}: has quantised tensors ('.qweight'), but config.json has no quantization_config and there is no"
        f" quantize_config.json that says how: {CURE}"
    )
