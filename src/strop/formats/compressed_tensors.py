"""Weights of the compressed-tensors library: packed 4- and 8-bit integers in groups, 8-bit integers and floats."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.fp8 import block_of_scale, float8_weights
from strop.formats.quantized import (
    CURE,
    StoredWeight,
    TensorSource,
    check_settings,
    find_part,
    integer_value,
    integer_weight,
    refuse,
    unpack_words,
    words_shape,
)
from strop.formats.values import DENSE_DTYPES, TensorValue

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "format": (*_FORMATS, "mixed-precision", None),
    "quantization_status": ("compressed", "frozen", None),
    "transform_config": (None, {}),
    "sparsity_config": (None, {}),
    "config_groups": (),
}
_HARMLESS = "quant_method ignore global_compression_ratio kv_cache_scheme version"
_GROUP_HARMLESS = "targets input_activations output_activations"
_WEIGHTS_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "type": ("int", "float"),
    "num_bits": (4, 8),
    "strategy": ("tensor", "channel", "group", "block", None),
    "dynamic": (False, None),
    "block_structure": (),
}
_WEIGHTS_HARMLESS = "symmetric group_size actorder observer observer_kwargs scale_dtype zp_dtype"


def compressed_weights(settings: Mapping[str, Any], source: TensorSource) -> list[StoredWeight]:
    """Every compressed weight. Raises UnsupportedError for other layouts, FormatError for parts that disagree."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") == "dense":
        settings = {**settings, "sparsity_config": None}
    check_settings(settings, _ACCEPTED, _HARMLESS, source.path)
    block = _check_groups(settings, source.path)
    packed = [name.removesuffix(".weight_packed") for name in source.tensors if name.endswith(".weight_packed")]
    integers = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and info.format == "I8"
    ]
    return [
        *(_packed(stem, source) for stem in packed),
        *(_integers(stem, source) for stem in integers),
        *float8_weights(source, block),
    ]


def _check_groups(settings: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The shape of a block, 128 x 128 where none is given."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise refuse(settings, "config_groups", "an object of objects", path)
    block = [128, 128]
    for group in groups.values():
        check_settings(group, {"format": (*_FORMATS, None), "weights": ()}, _GROUP_HARMLESS, path)
        weights = group.get("weights") or {}
        if not isinstance(weights, dict):
            raise refuse(group, "weights", "an object", path)
        check_settings(weights, _WEIGHTS_ACCEPTED, _WEIGHTS_HARMLESS, path)
        if (weights.get("type"), weights.get("num_bits")) == ("float", 4):
            raise refuse(weights, "num_bits", "8 for type='float'", path)
        block = weights.get("block_structure") or block
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UnsupportedError(f"{path}: block_structure={block!r} is not two integers above 0: {CURE}")
    return block[0], block[1]


def _packed(stem: str, source: TensorSource) -> StoredWeight:
    """Integers in 32-bit words along the input features, each plus half its range."""
    num_rows, num_words = words_shape(source, f"{stem}.weight_packed")
    find_part(source, f"{stem}.weight_shape", ("I64", "I32"), (2,))
    rows, k_len = (int(length) for length in source.read(f"{stem}.weight_shape"))
    scale = find_part(source, f"{stem}.weight_scale", tuple(DENSE_DTYPES))
    bits = next((bits for bits in (4, 8) if -(-k_len * bits // 32) == num_words), None)
    num_groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if bits is None or rows != num_rows or scale.shape[:1] != (rows,) or not num_groups or k_len % num_groups:
        raise FormatError(
            f"{source.path}: the weight {stem!r} of shape {(rows, k_len)} does not fit words {(num_rows, num_words)} of"
            f" 4 or 8 bits and scales {scale.shape}; the model is damaged: download it again"
        )
    group_of = np.arange(k_len) // (k_len // num_groups)
    parts = [f"{stem}.{part}" for part in ("weight_packed", "weight_shape", "weight_scale")]
    if f"{stem}.weight_g_idx" in source.tensors:
        parts.append(f"{stem}.weight_g_idx")
        find_part(source, f"{stem}.weight_g_idx", ("I32", "I64"), (k_len,))
        stored = source.read(f"{stem}.weight_g_idx")
        if (stored >= 0).all():  # -1 stands for no act-order
            if stored.max() >= num_groups:
                raise FormatError(
                    f"{source.path}: the tensor {stem + '.weight_g_idx'!r} names group {stored.max()} of {num_groups};"
                    " the model is damaged: download it again"
                )
            group_of = stored
    has_zeros = f"{stem}.weight_zero_point" in source.tensors
    if has_zeros:
        parts.append(f"{stem}.weight_zero_point")
        shape = (-(-rows * bits // 32), num_groups)
        find_part(source, f"{stem}.weight_zero_point", ("I32",), shape)
    decode = partial(_decode_packed, stem, bits, has_zeros, group_of, source)
    shape = rows, k_len
    return integer_weight(f"{stem}.weight", shape, bits, group_of, scale.format, has_zeros, parts, decode)


def _decode_packed(stem: str, bits: int, has_zeros: bool, group_of: np.ndarray, source: TensorSource) -> TensorValue:
    codes = np.ascontiguousarray(unpack_words(source.read(f"{stem}.weight_packed"), bits)[:, : len(group_of)])
    zero: int | np.ndarray = 1 << bits - 1
    if has_zeros:
        words = source.read(f"{stem}.weight_zero_point")
        zero = np.ascontiguousarray(unpack_words(words.T, bits)[:, : len(codes)].T)
    return integer_value(codes, source.read(f"{stem}.weight_scale"), zero, bits, group_of)


def _integers(stem: str, source: TensorSource) -> StoredWeight:
    """8-bit integers with a scale for each row, or one for all."""
    shape = source.tensors[f"{stem}.weight"].shape
    scale = find_part(source, f"{stem}.weight_scale", tuple(DENSE_DTYPES))
    if block_of_scale(shape, scale.shape, None) is None:
        raise FormatError(
            f"{source.path}: the scales of {stem!r} have shape {scale.shape}, expected one or one per row of a weight"
            f" of {shape}; the model is damaged: download it again"
        )
    parts = [f"{stem}.weight", f"{stem}.weight_scale"]
    has_zeros = f"{stem}.weight_zero_point" in source.tensors
    if has_zeros:
        parts.append(f"{stem}.weight_zero_point")
        find_part(source, f"{stem}.weight_zero_point", ("I8",), scale.shape)
    group_of = np.zeros(shape[1], int)
    decode = partial(_decode_integers, stem, has_zeros, group_of, source)
    shape = shape[0], shape[1]
    return integer_weight(f"{stem}.weight", shape, 8, group_of, scale.format, has_zeros, parts, decode)


def _decode_integers(stem: str, has_zeros: bool, group_of: np.ndarray, source: TensorSource) -> TensorValue:
    def per_row(name: str) -> np.ndarray:
        return np.broadcast_to(source.read(name).reshape(-1, 1), (len(codes), 1))

    codes = _from_signed(source.read(f"{stem}.weight"))
    zero = _from_signed(per_row(f"{stem}.weight_zero_point")) if has_zeros else 128
    return integer_value(codes, per_row(f"{stem}.weight_scale"), zero, 8, group_of)


def _from_signed(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8) ^ np.uint8(128)
