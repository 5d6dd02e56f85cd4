"""GGUF K-quants and IQ4_XS -> canonical values: super-blocks of 256 weights, with scales in two levels.

Layouts: `block_q2_K` and its neighbours in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; how the
6-bit scales are interleaved: `get_scale_min_k4` and `dequantize_row_q3_K` in ggml-quants.c.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from strop.formats.values import IQ4_CODES, SUPER_LEN, GroupQuantized, TwoLevelScale


@dataclass(frozen=True, slots=True)
class _Parts:
    """What B decoded super-blocks hold."""

    codes: np.ndarray
    """uint8 [B, 256]."""
    local_scale: np.ndarray
    """int8 or uint8 [B, 256 // group_len]."""
    local_min: np.ndarray | None = None
    """uint8, likewise."""


@dataclass(frozen=True, slots=True)
class SuperBlockFormat:
    """Layout of one super-block of 256 weights."""

    bits: int
    """Of a canonical code."""
    zero: int
    group_len: int
    fields: np.dtype
    """Little-endian and unpadded; `d` scales the local scales and `dmin`, if there, the minima."""
    decode: Callable[[np.ndarray], _Parts]
    """Records [B] -> codes and local scales."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one super-block."""
        return self.fields.itemsize

    @property
    def has_offset(self) -> bool:
        """Whether groups have a minimum that is subtracted."""
        return "dmin" in (self.fields.names or ())


def _planes(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """uint8 [B, n] -> [B, n * 8 // bits]: of every `run` bytes first their lowest `bits`, then the next ones, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts[:, None]
    fields &= np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, 12] -> scales and minima [B, 8]: numbers 0 to 3 lie whole, 4 to 7 as four low and two high bits."""
    scale, least, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 0x3F, (low & 0x0F) | (scale >> 6) << 4], axis=1)
    minima = np.concatenate([least & 0x3F, low >> 4 | (least >> 6) << 4], axis=1)
    return scales, minima


def _q2_k(blocks: np.ndarray) -> _Parts:
    return _Parts(_planes(blocks["codes"], 2, 32), blocks["scales"] & 0x0F, blocks["scales"] >> 4)


def _q3_k(blocks: np.ndarray) -> _Parts:
    codes = _planes(blocks["codes"], 2, 32)
    codes |= _planes(blocks["high"], 1, 32) << 2
    scales = _planes(blocks["scales"][:, :8], 4, 8) | _planes(blocks["scales"][:, 8:], 2, 4) << 4
    return _Parts(codes, scales.view(np.int8) - np.int8(32))


def _q4_k(blocks: np.ndarray) -> _Parts:
    return _Parts(_planes(blocks["codes"], 4, 32), *_six_bit_pairs(blocks["scales"]))


def _q5_k(blocks: np.ndarray) -> _Parts:
    codes = _planes(blocks["codes"], 4, 32)
    codes |= _planes(blocks["high"], 1, 32) << 4
    return _Parts(codes, *_six_bit_pairs(blocks["scales"]))


def _q6_k(blocks: np.ndarray) -> _Parts:
    codes = _planes(blocks["codes"], 4, 64)
    codes |= _planes(blocks["high"], 2, 32) << 4
    return _Parts(codes, blocks["scales"])


def _iq4_xs(blocks: np.ndarray) -> _Parts:
    high = blocks["scales_high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = _planes(blocks["scales_low"], 4, 1) | high.astype(np.uint8) << 4
    return _Parts(IQ4_CODES[_planes(blocks["codes"], 4, 16)], scales.view(np.int8) - np.int8(32))


_D, _DMIN = ("d", "<f2"), ("dmin", "<f2")
# fmt: off
SUPER_BLOCK_FORMATS = {
    "Q2_K": SuperBlockFormat(
        2, 0, 16, np.dtype([("scales", "u1", 16), ("codes", "u1", 64), _D, _DMIN]), _q2_k),
    "Q3_K": SuperBlockFormat(
        3, 4, 16, np.dtype([("high", "u1", 32), ("codes", "u1", 64), ("scales", "u1", 12), _D]), _q3_k),
    "Q4_K": SuperBlockFormat(
        4, 0, 32, np.dtype([_D, _DMIN, ("scales", "u1", 12), ("codes", "u1", 128)]), _q4_k),
    "Q5_K": SuperBlockFormat(
        5, 0, 32, np.dtype([_D, _DMIN, ("scales", "u1", 12), ("high", "u1", 32), ("codes", "u1", 128)]), _q5_k),
    "Q6_K": SuperBlockFormat(
        6, 32, 16, np.dtype([("codes", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D]), _q6_k),
    "IQ4_XS": SuperBlockFormat(
        8, 128, 32, np.dtype([_D, ("scales_high", "<u2"), ("scales_low", "u1", 4), ("codes", "u1", 128)]), _iq4_xs),
}
# fmt: on


def decode_super_blocks(format_name: str, raw: np.ndarray, shape: tuple[int, int]) -> GroupQuantized:
    """Raw GGUF super-blocks (uint8, flat) -> the canonical [N, K] value. `raw` must hold exactly N * K // 256."""
    layout = SUPER_BLOCK_FORMATS[format_name]
    rows, columns = shape
    blocks = raw.view(layout.fields)
    supers, groups = (rows, columns // SUPER_LEN), (rows, columns // layout.group_len)
    parts = layout.decode(blocks)
    scale = TwoLevelScale(np.ascontiguousarray(blocks["d"]).reshape(supers), parts.local_scale.reshape(groups))
    offset = None
    if parts.local_min is not None:
        offset = TwoLevelScale(-blocks["dmin"].reshape(supers), parts.local_min.reshape(groups))
    return GroupQuantized(parts.codes.reshape(shape), scale, offset, layout.zero, layout.bits, layout.group_len)
