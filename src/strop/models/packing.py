"""Canonical values -> the native kernels' tiles (native/kernels/linear.h)."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from strop.formats.eight_bit_groups import RoundingError, to_eight_bit_groups
from strop.formats.values import GroupQuantized, Scale, TensorValue, TwoLevelScale, dense
from strop.ops.weights import GROUP_LEN, PACKED_FORMATS, TILE_COLUMNS

_DENSE_FORMATS = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}


def packed_format(value: TensorValue) -> str:
    """The key of PACKED_FORMATS that `value` is packed in: the smallest that holds it exactly, else 8-bit groups.

    It depends on the value's form alone, not on its numbers.
    """
    if isinstance(value, np.ndarray):
        return _DENSE_FORMATS[value.dtype]
    return _exact_format(value) or ("q8" if value.offset is None else "q8_offset")


def _exact_format(value: GroupQuantized) -> str | None:
    has_offset = value.offset is not None
    scales = [value.scale] if value.offset is None else [value.scale, value.offset]
    integers = [scale.local.dtype for scale in scales if isinstance(scale, TwoLevelScale)]
    if value.group_len != GROUP_LEN or len(integers) not in (0, len(scales)):
        return None
    if any(dtype != (np.uint8 if has_offset else np.int8) for dtype in integers):
        return None
    has_zeros = isinstance(value.zero, np.ndarray)
    wanted = 0 if has_zeros else value.zero, has_offset or has_zeros, has_zeros, bool(integers)
    for name, packed in PACKED_FORMATS.items():
        if value.bits <= packed.bits and wanted == (
            packed.zero, packed.has_offset, packed.has_zeros, packed.two_level,
        ):  # fmt: skip
            return name
    return None


def common_format(names: Collection[str]) -> str:
    """The smallest format that holds what each of `names` holds, exactly."""
    return next(name for name in PACKED_FORMATS if all(_holds(name, other) for other in names))


def _holds(name: str, other: str) -> bool:
    if name in (other, "f32"):
        return True
    outer, inner = PACKED_FORMATS[name], PACKED_FORMATS[other]
    if not (outer.quantized and inner.quantized) or outer.two_level != inner.two_level or outer.bits < inner.bits:
        return False
    if replace(outer, code=0, bits=8) == replace(inner, code=0, bits=8):
        return True
    if outer.two_level:
        return False
    if name == "q8":  # codes move until 128 stands for 0
        return not inner.has_offset or (inner.has_zeros and inner.bits < 8)
    if outer.has_zeros:
        return inner.has_zeros or not inner.has_offset
    return name == "q8_offset" and not inner.has_zeros  # a zero for all is a power of two: it moves into the offset


def convert(value: TensorValue, format_name: str) -> tuple[TensorValue, RoundingError | None]:
    """`value` as `format_name` holds it, and the error where that is not exact.

    Args:
        format_name: that of `packed_format`, or one that holds it (`common_format`).
    """
    if format_name == packed_format(value) and (isinstance(value, np.ndarray) or _exact_format(value)):
        return value, None
    if format_name == "f32" or isinstance(value, np.ndarray):
        return dense(value), None
    error = None
    if _exact_format(value) is None:
        value, error = to_eight_bit_groups(value)
    packed = PACKED_FORMATS[format_name]
    if packed.has_zeros:
        rows, columns = value.shape
        zero = np.broadcast_to(np.asarray(value.zero, np.uint8), (rows, columns // GROUP_LEN))
        return replace(value, zero=zero, bits=packed.bits), error
    if format_name == "q8":
        return value.with_zero_128(), error
    if value.offset is None:
        assert isinstance(value.scale, np.ndarray)
        offset = (value.scale.astype(np.float32) * -value.zero).astype(np.float16)
        return GroupQuantized(value.codes, value.scale, offset, 0, 8), error
    return replace(value, bits=packed.bits), error


def packed_bytes(format_name: str, num_rows: int, k_len: int) -> int:
    """Bytes of a packed [N, K] matrix."""
    return -(-num_rows // TILE_COLUMNS) * PACKED_FORMATS[format_name].tile_bytes(k_len)


def pack(parts: Sequence[TensorValue], format_name: str, out: np.ndarray, *, interleave: bool = False) -> None:
    """Packs the rows of `parts` (see `convert`), one after the other, into `out` (uint8, flat). Nothing is rounded.

    With `interleave` the two parts' tiles of 16 rows alternate, as a gated MLP wants them.
    """
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
    if isinstance(parts[0], np.ndarray):
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    quantized = [part for part in parts if isinstance(part, GroupQuantized)]
    offsets = [part.offset for part in quantized if part.offset is not None]
    zeros = [part.zero for part in quantized if isinstance(part.zero, np.ndarray)]
    return replace(
        max(quantized, key=lambda part: part.bits),
        zero=np.concatenate(zeros) if zeros else quantized[0].zero,
        codes=np.concatenate([part.codes for part in quantized]),
        scale=_join_scales([part.scale for part in quantized]),
        offset=_join_scales(offsets) if offsets else None,
    )


def _join_scales(scales: Sequence[Scale]) -> Scale:
    two_level = [scale for scale in scales if isinstance(scale, TwoLevelScale)]
    if not two_level:
        return np.concatenate([scale for scale in scales if isinstance(scale, np.ndarray)])
    return TwoLevelScale(
        np.concatenate([scale.super_scale for scale in two_level]), np.concatenate([scale.local for scale in two_level])
    )


def _pack_tiles(part: TensorValue, format_name: str, tiles: np.ndarray) -> None:
    """Writes `part` [N, K] into `tiles` uint8 [ceil(N / 16), tile_bytes]; missing rows become zeros."""
    packed = PACKED_FORMATS[format_name]
    for first in range(0, tiles.shape[0], 64):  # bounds the copies' memory
        some = slice(first * TILE_COLUMNS, min((first + 64) * TILE_COLUMNS, part.shape[0]))
        into = tiles[first : first + 64]
        if isinstance(part, np.ndarray):
            _pack_dense(part[some], packed.in_pairs, into)
        else:
            _pack_quantized(part.take_rows(some), packed.bits, into)


def _pad_rows(array: np.ndarray, num_rows: int) -> np.ndarray:
    if array.shape[0] == num_rows:
        return array
    padded = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    padded[: array.shape[0]] = array
    return padded


def _pack_quantized(part: GroupQuantized, bits: int, tiles: np.ndarray) -> None:
    num_tiles, groups = len(tiles), part.shape[1] // GROUP_LEN
    codes = _pad_rows(part.codes, num_tiles * TILE_COLUMNS)  # whose scales are 0
    codes = codes.reshape(num_tiles, TILE_COLUMNS, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    at = groups * bits * 64
    by_group = tiles[:, :at].reshape(num_tiles, groups, bits * 64)
    if bits == 8:
        by_group[...] = codes.reshape(num_tiles, groups, -1)
    else:
        by_group[..., :256] = (codes[:, :, :4] & 15 | codes[:, :, 4:] << 4).reshape(num_tiles, groups, -1)
    if bits == 5:
        by_group[..., 256:] = np.packbits(codes.reshape(num_tiles, groups, -1) >> 4, axis=-1, bitorder="little")
    for values in _scale_arrays(part):
        by_column = _pad_rows(values, num_tiles * TILE_COLUMNS).reshape(num_tiles, TILE_COLUMNS, -1)
        flat = np.ascontiguousarray(by_column.transpose(0, 2, 1)).view(np.uint8).reshape(num_tiles, -1)
        tiles[:, at : at + flat.shape[1]] = flat
        at += flat.shape[1]
    tiles[:, at:] = 0


def _scale_arrays(part: GroupQuantized) -> list[np.ndarray]:
    """In the order of a tile."""
    if isinstance(part.zero, np.ndarray):
        assert isinstance(part.scale, np.ndarray)
        return [part.scale, -part.zero.astype(np.float16)]
    scales = [scale for scale in (part.scale, part.offset) if scale is not None]
    two_level = [scale for scale in scales if isinstance(scale, TwoLevelScale)]
    one_level = [scale for scale in scales if isinstance(scale, np.ndarray)]
    return one_level or [scale.local for scale in two_level] + [scale.super_scale for scale in two_level]


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
