"""Quantised weights as the quantisers' own formats define them, one code at a time, and what those codes stand for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each field of a word holds, lowest bits first."""


@dataclass(frozen=True)
class Quantized:
    """A weight's tensors by suffix, and its exact value: float64 [N, K]."""

    tensors: Tensors
    value: np.ndarray


def _codes(weight: np.ndarray, bits: int, group_of: np.ndarray, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Round to nearest: codes int64 [N, K], scale float16 [N, G], zero int64 [N, G]."""
    num_groups = group_of.max() + 1
    top = (1 << bits) - 1
    scale = np.empty((len(weight), num_groups), np.float16)
    zero = np.full((len(weight), num_groups), 1 << bits - 1)
    for g in range(num_groups):
        group = weight[:, group_of == g].astype(np.float64)
        low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        if symmetric:
            scale[:, g] = 2 * np.abs(group).max(1) / top
        else:
            scale[:, g] = (high - low) / top
            zero[:, g] = np.clip(np.rint(-low / scale[:, g]), 0, top)
    steps = scale.astype(np.float64)[:, group_of]
    return np.clip(np.rint(weight / steps) + zero[:, group_of], 0, top).astype(np.int64), scale, zero


def _words(fields: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """[..., F] codes -> int32 [..., W]: field j of a word holds the word's code `order[j]`."""
    in_word = 32 // bits
    padded = np.zeros((*fields.shape[:-1], -(-fields.shape[-1] // in_word) * in_word), np.int64)
    padded[..., : fields.shape[-1]] = fields
    grouped = padded.reshape(*fields.shape[:-1], -1, in_word)
    words = np.zeros(grouped.shape[:-1], np.int64)
    for j, place in enumerate(order or range(in_word)):
        words |= grouped[..., place] << bits * j
    return words.astype(np.uint32).view(np.int32)


def gptq(
    weight: np.ndarray,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    v2: bool = False,
    group_of: np.ndarray | None = None,
) -> Quantized:
    """`group_of` is the g_idx of act-order."""
    k_len = weight.shape[1]
    group_size = k_len if group_size == -1 else group_size
    g_idx = np.arange(k_len) // group_size if group_of is None else group_of
    codes, scale, zero = _codes(weight, bits, g_idx, symmetric)
    qzeros = _words(zero.T, bits).view(np.uint32)
    if not v2:
        ones = sum(1 << bits * j for j in range(32 // bits))
        qzeros = qzeros - np.uint32(ones)
    tensors = {
        "qweight": np.ascontiguousarray(_words(codes, bits).T),
        "qzeros": qzeros.view(np.int32),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": g_idx.astype(np.int32),
    }
    return Quantized(tensors, scale.astype(np.float64)[:, g_idx] * (codes - zero[:, g_idx]))


def awq(weight: np.ndarray, *, group_size: int = 32) -> Quantized:
    """AutoAWQ's "gemm" layout."""
    k_len = weight.shape[1]
    group_of = np.arange(k_len) // (k_len if group_size == -1 else group_size)
    codes, scale, zero = _codes(weight, 4, group_of, symmetric=False)
    tensors = {
        "qweight": _words(codes.T, 4, AWQ_ORDER),
        "qzeros": _words(zero.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(scale.T),
    }
    return Quantized(tensors, scale.astype(np.float64)[:, group_of] * (codes - zero[:, group_of]))


def packed(
    weight: np.ndarray,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    scale_dtype: Any = ml_dtypes.bfloat16,
    group_of: np.ndarray | None = None,
) -> Quantized:
    """compressed-tensors' "pack-quantized" layout."""
    k_len = weight.shape[1]
    g_idx = np.arange(k_len) // (k_len if group_size == -1 else group_size) if group_of is None else group_of
    codes, half, zero = _codes(weight, bits, g_idx, symmetric)
    scale = half.astype(scale_dtype)
    tensors = {
        "weight_packed": _words(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(_words(zero.T, bits).T)
    if group_of is not None:
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return Quantized(tensors, scale.astype(np.float64)[:, g_idx] * (codes - zero[:, g_idx]))


def int8(weight: np.ndarray) -> Quantized:
    """compressed-tensors' "int-quantized" layout, a scale per row."""
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    codes = np.clip(np.rint(weight / scale.astype(np.float64)), -127, 127).astype(np.int8)
    return Quantized({"weight": codes, "weight_scale": scale}, scale.astype(np.float64) * codes)


def fp8(
    weight: np.ndarray,
    *,
    block: tuple[int, int] | None,
    name: str = "weight_scale_inv",
    scale_dtype: Any = np.float32,
) -> Quantized:
    """E4M3 with a scale per block; per row with block=(1, K), for all with None. The scales may be powers of two."""
    rows, columns = weight.shape
    height, width = block or weight.shape
    scale = np.empty((-(-rows // height), -(-columns // width)), np.float32)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    value = np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(scale.shape):
        place = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        scale[i, j] = np.abs(weight[place]).max() / 448
        if scale_dtype != np.float32:
            scale[i, j] = 2 ** np.ceil(np.log2(scale[i, j]))
        codes[place] = (weight[place] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        value[place] = codes[place].astype(np.float32) * scale[i, j]
    stored = (scale.reshape(()) if block is None else scale).astype(scale_dtype)
    return Quantized({"weight": codes, name: stored}, value.astype(ml_dtypes.bfloat16).astype(np.float64))


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """As `safetensors.numpy.save_file`, which does not know 8-bit floats."""
    names = {
        "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "int8": "I8",
        "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    }  # fmt: skip
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
