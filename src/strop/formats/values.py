"""Canonical tensor values: what every file format decodes to, and what packing and artifacts start from.

A value is exact: it holds the file's own numbers, re-arranged but never rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

GROUP_LEN = 32
"""Weights that share one scale: the block length of GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""

DENSE_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dense formats, by the name both GGUF and safetensors give them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says about one tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    """Row-major, outermost axis first (numpy's order)."""
    format: str
    """"F32", "F16", "BF16", or a block format such as "Q4_1"."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """Integer codes with one scale (and perhaps one offset) per group of 32 weights along a row.

    w[n, k] = scale[n, k // 32] * (codes[n, k] - zero) + (offset[n, k // 32] if offset is not None else 0)
    """

    codes: np.ndarray
    """uint8 [N, K], each below 2**bits."""
    scale: np.ndarray
    """float16 [N, K // 32]."""
    offset: np.ndarray | None
    """float16 [N, K // 32], or None."""
    zero: int
    """The code that stands for a weight of 0 (plus the offset)."""
    bits: int
    """4, 5 or 8."""

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.codes.dtype != np.uint8 or self.bits not in (4, 5, 8) or not 0 <= self.zero < 1 << self.bits:
            raise ValueError(f"codes are {self.codes.dtype} with bits={self.bits}, zero={self.zero}")
        for part in (self.scale, self.offset):
            if part is not None and (part.dtype != np.float16 or part.shape != (rows, columns // GROUP_LEN)):
                raise ValueError(f"{part.dtype} {part.shape} does not fit codes of shape {self.codes.shape}")
        if columns % GROUP_LEN:
            raise ValueError(f"rows of {columns} weights are not whole groups of {GROUP_LEN}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]. The product is exact (a float16 times a small integer); only adding the offset rounds."""
        rows, columns = self.shape
        grouped = (rows, columns // GROUP_LEN, GROUP_LEN)
        weights = self.codes.reshape(grouped).astype(np.float32)
        weights -= np.float32(self.zero)
        weights *= self.scale.astype(np.float32)[:, :, None]
        if self.offset is not None:
            weights += self.offset.astype(np.float32)[:, :, None]
        return weights.reshape(rows, columns)

    def take_rows(self, index: np.ndarray | slice) -> "GroupQuantized":
        """The same weights with rows picked by integers or a slice; lossless, since no group crosses a row."""
        offset = None if self.offset is None else self.offset[index]
        return GroupQuantized(self.codes[index], self.scale[index], offset, self.zero, self.bits)


TensorValue = np.ndarray | GroupQuantized
"""A dense array (float32, float16 or bfloat16) or a group-quantised matrix."""


def dense(value: TensorValue) -> np.ndarray:
    """float32 array with the value's exact numbers (dequantised if need be)."""
    if isinstance(value, GroupQuantized):
        return value.dequantize()
    return value.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Layout of one GGUF block of 32 weights: scale, [offset], [fifth bits], codes. All little-endian, unpadded."""

    bits: int
    zero: int
    has_offset: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        fifth_bits_bytes = GROUP_LEN // 8 if self.bits == 5 else 0
        code_bytes = GROUP_LEN if self.bits == 8 else GROUP_LEN // 2
        return 2 + 2 * self.has_offset + fifth_bits_bytes + code_bytes


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(bits=4, zero=8, has_offset=False),
    "Q4_1": BlockFormat(bits=4, zero=0, has_offset=True),
    "Q5_0": BlockFormat(bits=5, zero=16, has_offset=False),
    "Q5_1": BlockFormat(bits=5, zero=0, has_offset=True),
    "Q8_0": BlockFormat(bits=8, zero=128, has_offset=False),
}


def decode_blocks(format_name: str, raw: np.ndarray, shape: tuple[int, int]) -> GroupQuantized:
    """Raw GGUF blocks (uint8, flat) -> the canonical [N, K] value. `raw` must hold exactly N * K // 32 blocks."""
    layout = BLOCK_FORMATS[format_name]
    rows, columns = shape
    groups = columns // GROUP_LEN
    blocks = raw.reshape(rows * groups, layout.block_bytes)
    scale = _float16_column(blocks, 0).reshape(rows, groups)
    offset = _float16_column(blocks, 2).reshape(rows, groups) if layout.has_offset else None
    codes = _DECODE_CODES[layout.bits](blocks[:, 2 + 2 * layout.has_offset :]).reshape(rows, columns)
    return GroupQuantized(codes, scale, offset, layout.zero, layout.bits)


def _float16_column(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[blocks, 16] -> [blocks, 32]: low halves are the block's first 16 weights, high halves its last 16."""
    codes = np.empty((packed.shape[0], GROUP_LEN), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, :16])
    np.right_shift(packed, 4, out=codes[:, 16:])
    return codes


def _five_bits(packed: np.ndarray) -> np.ndarray:
    """[blocks, 4 + 16] -> [blocks, 32]: 32 fifth bits (weight i is bit i), then the nibbles."""
    codes = _nibbles(packed[:, 4:])
    codes |= np.unpackbits(packed[:, :4], axis=1, bitorder="little") << 4
    return codes


def _bytes(packed: np.ndarray) -> np.ndarray:
    """[blocks, 32] of int8 -> codes shifted by 128: flipping the sign bit adds 128 modulo 256."""
    return packed ^ np.uint8(0x80)


_DECODE_CODES: dict[int, Callable[[np.ndarray], np.ndarray]] = {4: _nibbles, 5: _five_bits, 8: _bytes}
