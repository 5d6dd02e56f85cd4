"""8-bit float weights (E4M3) with scales by block, row or matrix, and 8-bit integers by row: what compressed-tensors,
DeepSeek, Qwen and FBGEMM store. Floats become bfloat16."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from strop.core.errors import FormatError
from strop.formats.quantized import StoredWeight, TensorSource, check_settings, find_part, refuse
from strop.formats.values import DENSE_DTYPES, TensorInfo

_SCALES = ("weight_scale_inv", "weight_scale")
"""Both are factors of the weight, whatever their names say."""
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "weight_block_size": (),
    "activation_scheme": ("dynamic", "static", None),
    "scale_fmt": ("float", "ue8m0", None),
}
_HARMLESS = """quant_method modules_to_not_convert ignored_layers kv_cache_scheme activation_scale_ub dequantize
    quantization_status"""
_VALUE_OF_BYTE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_CHUNK_WEIGHTS = 1 << 22


def fp8_weights(settings: Mapping[str, Any], source: TensorSource) -> list[StoredWeight]:
    """The weights in E4M3. Raises UnsupportedError for other layouts, FormatError for parts that disagree."""
    check_settings(settings, _ACCEPTED, _HARMLESS, source.path)
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise refuse(settings, "weight_block_size", "two integers above 0, or null", source.path)
    return float8_weights(source, None if block is None else (block[0], block[1]))


def float8_weights(source: TensorSource, block: tuple[int, int] | None) -> list[StoredWeight]:
    """Every `NAME.weight` in E4M3, with scales per block of [rows, columns], row or matrix, as their shape says."""
    stems = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and info.format == "F8_E4M3"
    ]
    return [_weight(stem, block, source) for stem in stems]


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _weight(stem: str, block: tuple[int, int] | None, source: TensorSource) -> StoredWeight:
    shape = source.tensors[f"{stem}.weight"].shape
    found = [f"{stem}.{name}" for name in _SCALES if f"{stem}.{name}" in source.tensors]
    name = found[0] if found else f"{stem}.{_SCALES[1]}"
    scale = find_part(source, name, (*DENSE_DTYPES, "F8_E8M0"))
    sizes = block_of_scale(shape, scale.shape, block)
    if sizes is None:
        blocks = f", or one per block of {block}" if block else ""
        raise FormatError(
            f"{source.path}: the tensor {name!r} has shape {scale.shape}, expected one scale, one per row{blocks} of a"
            f" weight of {shape}; the model is damaged or its quantization_config belongs to another one"
        )
    info = TensorInfo(f"{stem}.weight", shape, "BF16", 2 * shape[0] * shape[1])
    decode = partial(_decode, f"{stem}.weight", name, sizes, source)
    return StoredWeight(info, (f"{stem}.weight", name), decode, "are 8-bit floats, held as bfloat16")


def block_of_scale(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None when the shapes do not fit."""
    if len(shape) != 2 or 0 in shape:
        return None
    rows, columns = shape
    if scale_shape in ((), (1,), (1, 1)):
        return rows, columns
    if scale_shape in ((rows,), (rows, 1)):
        return 1, columns
    if block is not None and scale_shape == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    return None


def _decode(weight: str, scale_name: str, block: tuple[int, int], source: TensorSource) -> np.ndarray:
    stored = source.read(weight).view(np.uint8)
    rows, columns = stored.shape
    scale = source.read(scale_name).astype(np.float32).reshape(-(-rows // block[0]), -(-columns // block[1]))
    by_column = np.repeat(scale, block[1], axis=1)[:, :columns] if scale.shape[1] > 1 else scale
    weights = np.empty(stored.shape, ml_dtypes.bfloat16)
    at_once = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, at_once):
        some = np.arange(start, min(start + at_once, rows))
        weights[some[0] : some[-1] + 1] = _VALUE_OF_BYTE[stored[some]] * by_column[some // block[0]]
    return weights
