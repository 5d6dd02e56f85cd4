"""Canonical values -> the native kernels' tiles (native/kernels/linear.h). Exact: re-arranged, never rounded."""

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.values import GROUP_LEN, GroupQuantized, Scale, TensorValue, TwoLevelScale, dense
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS

_DENSE_FORMATS = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}


def unify(parts: Sequence[TensorValue]) -> list[TensorValue]:
    """The same matrices in one format, so that their rows can share a weight; every value stays exact."""
    quantized = [part for part in parts if isinstance(part, GroupQuantized)]
    if len(quantized) < len(parts):
        if len({part.dtype for part in parts if isinstance(part, np.ndarray)}) == 1 and not quantized:
            return list(parts)
        return [dense(part) for part in parts]
    if len({(part.bits, _common_zero(part), part.offset is None) for part in quantized}) == 1:
        return list(parts)
    zeros_by_group = [part for part in quantized if _common_zero(part) is None]
    if any(part.offset is not None for part in quantized):
        return [dense(part) for part in quantized] if zeros_by_group else [_with_offset(part) for part in quantized]
    if zeros_by_group and len({part.bits for part in quantized}) == 1:
        return [_with_zeros(part) for part in quantized]
    if any(part.bits == 8 for part in zeros_by_group):
        return [dense(part) for part in quantized]
    return [part.with_zero_128() for part in quantized]


def _with_zeros(part: GroupQuantized) -> GroupQuantized:
    rows, columns = part.shape
    return replace(part, zero=np.broadcast_to(np.asarray(part.zero, np.uint8), (rows, columns // part.group_len)))


def _common_zero(part: GroupQuantized) -> int | None:
    return None if isinstance(part.zero, np.ndarray) else part.zero


def _with_offset(part: GroupQuantized) -> TensorValue:
    scale = _one_level(part.scale)
    offset = np.zeros_like(scale) if part.offset is None else _one_level(part.offset)
    folded = (offset.astype(np.float64) - part.zero * scale.astype(np.float64)).astype(np.float16)
    return GroupQuantized(part.codes, scale, folded, 0, 8)


def _one_level(scale: Scale) -> np.ndarray:
    if isinstance(scale, TwoLevelScale):
        raise UnsupportedError(
            "the native kernels have no packed format for K-quants (scales in two levels) yet; they take Q4_0, Q4_1,"
            " Q5_0, Q5_1, Q8_0 and IQ4_NL: use a file with one of these types, or set STROP_NATIVE=0"
        )
    return scale


def packed_format(part: TensorValue) -> str:
    """The key of PACKED_FORMATS that holds `part` exactly."""
    if isinstance(part, np.ndarray):
        return _DENSE_FORMATS[part.dtype]
    _one_level(part.scale)
    if isinstance(part.zero, np.ndarray):
        return "q4_zeros" if part.bits == 4 else "q8_zeros"
    if part.offset is not None:
        return "q4_offset" if part.bits == 4 and part.zero == 0 else "q8_offset"
    return {8: "q4", 128: "q8", 16: "q8_zero16"}[part.zero]


def packed_bytes(format_name: str, num_rows: int, k_len: int) -> int:
    """Bytes of a packed [N, K] matrix."""
    return -(-num_rows // TILE_COLUMNS) * PACKED_FORMATS[format_name].tile_bytes(k_len)


def pack(parts: Sequence[TensorValue], out: np.ndarray, *, interleave: bool = False) -> None:
    """Packs the rows of `parts` (one format, see `unify`), one after the other, into `out` (uint8, flat).

    With `interleave` the two parts' tiles of 16 rows alternate, as a gated MLP wants them.
    """
    format_name = packed_format(parts[0])
    k_len = parts[0].shape[1]
    tile_bytes = PACKED_FORMATS[format_name].tile_bytes(k_len)
    if interleave:
        pairs = out.reshape(-1, 2, tile_bytes)
        for i, part in enumerate(parts):
            _pack_tiles(part, format_name, pairs[:, i])
        return
    tiles = out.reshape(-1, tile_bytes)
    if len(parts) == 1 or all(part.shape[0] % TILE_COLUMNS == 0 for part in parts):
        at = 0
        for part in parts:
            num_tiles = -(-part.shape[0] // TILE_COLUMNS)
            _pack_tiles(part, format_name, tiles[at : at + num_tiles])
            at += num_tiles
        return
    _pack_tiles(_join_rows(parts), format_name, tiles)


def _join_rows(parts: Sequence[TensorValue]) -> TensorValue:
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    quantized = [part for part in parts if isinstance(part, GroupQuantized)]
    offsets = [_one_level(part.offset) for part in quantized if part.offset is not None]
    return GroupQuantized(
        np.concatenate([part.codes for part in quantized]),
        np.concatenate([_one_level(part.scale) for part in quantized]),
        np.concatenate(offsets) if offsets else None,
        np.concatenate([part.zero for part in quantized]) if isinstance(first.zero, np.ndarray) else first.zero,
        first.bits,
    )


def _pack_tiles(part: TensorValue, format_name: str, tiles: np.ndarray) -> None:
    """Writes `part` [N, K] into `tiles` uint8 [ceil(N / 16), tile_bytes]; missing rows become zeros."""
    packed = PACKED_FORMATS[format_name]
    num_tiles, k_len = tiles.shape[0], part.shape[1]
    for first in range(0, num_tiles, 64):  # bounds the copies' memory
        some = slice(first * TILE_COLUMNS, min((first + 64) * TILE_COLUMNS, part.shape[0]))
        into = tiles[first : first + 64]
        if isinstance(part, np.ndarray):
            _pack_dense(part[some], packed.code == 4, into)
        else:
            _pack_quantized(part.take_rows(some), packed.bits, k_len // GROUP_LEN, into)


def _pad_rows(array: np.ndarray, num_rows: int) -> np.ndarray:
    if array.shape[0] == num_rows:
        return array
    padded = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    padded[: array.shape[0]] = array
    return padded


def _pack_quantized(part: GroupQuantized, bits: int, groups: int, tiles: np.ndarray) -> None:
    num_tiles = tiles.shape[0]
    codes = _pad_rows(part.codes, num_tiles * TILE_COLUMNS)  # whose scales are 0
    codes = codes.reshape(num_tiles, TILE_COLUMNS, groups, GROUP_LEN)
    if bits == 4:
        codes = codes[..., :16] | codes[..., 16:] << 4
    slices = codes.reshape(num_tiles, TILE_COLUMNS, groups, -1, 4).transpose(0, 2, 3, 1, 4)
    codes_bytes = codes.shape[-1] * groups * TILE_COLUMNS
    tiles[:, :codes_bytes].reshape(num_tiles, groups, -1, TILE_COLUMNS, 4)[...] = slices
    at = codes_bytes
    # The kernel multiplies the scale with what is added to the codes.
    offset = -part.zero.astype(np.float16) if isinstance(part.zero, np.ndarray) else part.offset
    for values in (part.scale, offset):
        if values is not None:
            by_column = _pad_rows(_one_level(values), num_tiles * TILE_COLUMNS).reshape(num_tiles, TILE_COLUMNS, groups)
            by_group = np.ascontiguousarray(by_column.transpose(0, 2, 1)).view(np.uint8).reshape(num_tiles, -1)
            tiles[:, at : at + by_group.shape[1]] = by_group
            at += by_group.shape[1]
    tiles[:, at:] = 0


def _pack_dense(part: np.ndarray, in_pairs: bool, tiles: np.ndarray) -> None:
    num_tiles, k_len = tiles.shape[0], part.shape[1]
    rows = _pad_rows(part, num_tiles * TILE_COLUMNS)
    if in_pairs:
        if k_len % 2:
            rows = np.concatenate([rows, np.zeros((rows.shape[0], 1), rows.dtype)], axis=1)
        by_k: np.ndarray = rows.reshape(num_tiles, TILE_COLUMNS, -1, 2).transpose(0, 2, 1, 3)
    else:
        by_k = rows.reshape(num_tiles, TILE_COLUMNS, k_len).transpose(0, 2, 1)
    flat = np.ascontiguousarray(by_k).view(np.uint8).reshape(num_tiles, -1)
    tiles[:, : flat.shape[1]] = flat
    tiles[:, flat.shape[1] :] = 0
