"""Canonical tensor values: what every file format decodes to, and what packing and artifacts start from.

A value is exact: it holds the file's own numbers, re-arranged but never rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

GROUP_LEN = 32
"""Weights that share one scale: the block length of GGUF's Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL."""
GROUP_LENS = (16, 32)
SUPER_LEN = 256
"""Weights in a super-block of a K-quant: those that share one float of a TwoLevelScale."""
CODE_BITS = (2, 3, 4, 5, 6, 8)

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
class TwoLevelScale:
    """Scales (or offsets) as K-quants store them: a float per 256 weights times a small integer per group.

    Both levels stay as the file has them, so that kernels can read the few bits; `product` is the scale itself.
    """

    super_scale: np.ndarray
    """float16 [N, K // 256]."""
    local: np.ndarray
    """int8 or uint8 [N, K // group_len]."""

    def __post_init__(self) -> None:
        if self.super_scale.dtype != np.float16 or self.local.dtype not in (np.int8, np.uint8):
            raise ValueError(f"super_scale is {self.super_scale.dtype} and local is {self.local.dtype}")
        if self.super_scale.ndim != 2 or self.local.ndim != 2 or len(self.super_scale) != len(self.local):
            raise ValueError(f"local {self.local.shape} does not fit super_scale {self.super_scale.shape}")
        if self.local.shape[1] % max(1, self.super_scale.shape[1]):
            raise ValueError(f"local {self.local.shape} is not whole super-blocks of {self.super_scale.shape}")

    def product(self) -> np.ndarray:
        """float32 [N, K // group_len], exact: 11 significant bits times 8 fit in 24."""
        rows, num_super = self.super_scale.shape
        factors = self.local.reshape(rows, num_super, -1).astype(np.float32)
        factors *= self.super_scale.astype(np.float32)[:, :, None]
        return factors.reshape(self.local.shape)

    def take_rows(self, index: np.ndarray | slice) -> "TwoLevelScale":
        """Rows picked by integers or a slice."""
        return TwoLevelScale(self.super_scale[index], self.local[index])


Scale = np.ndarray | TwoLevelScale
"""One number per group: float16 [N, K // group_len], or in two levels."""


def scale_values(scale: Scale) -> np.ndarray:
    """float32 [N, K // group_len], exact."""
    return scale.product() if isinstance(scale, TwoLevelScale) else scale.astype(np.float32)


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """Integer codes with one scale (and perhaps one offset) per group of weights along a row.

    With g = k // group_len:
    w[n, k] = scale[n, g] * (codes[n, k] - zero[n, g]) + (offset[n, g] if offset is not None else 0)

    An offset is always added. Formats that subtract a minimum (dmin * m) have -dmin as the offset's super_scale.
    """

    codes: np.ndarray
    """uint8 [N, K], each below 2**bits."""
    scale: Scale
    """[N, K // group_len]."""
    offset: Scale | None
    """[N, K // group_len], or None."""
    zero: int | np.ndarray
    """The code that stands for a weight of 0 (plus the offset): one for all, or uint8 [N, K // group_len], which needs
    offset None (GPTQ, AWQ)."""
    bits: int
    """2, 3, 4, 5, 6 or 8."""
    group_len: int = GROUP_LEN
    """Weights that share one scale: 16 or 32."""

    def __post_init__(self) -> None:
        columns = self.codes.shape[1]
        if self.codes.dtype != np.uint8 or self.bits not in CODE_BITS:
            raise ValueError(f"codes are {self.codes.dtype} with bits={self.bits}")
        if isinstance(self.zero, np.ndarray):
            groups = self.codes.shape[0], columns // self.group_len
            if self.zero.dtype != np.uint8 or self.zero.shape != groups or self.offset is not None:
                raise ValueError(f"zero is {self.zero.dtype} {self.zero.shape} for codes of shape {self.codes.shape}")
        elif not 0 <= self.zero < 1 << self.bits:
            raise ValueError(f"zero={self.zero} with bits={self.bits}")
        if self.group_len not in GROUP_LENS:
            raise ValueError(f"group_len={self.group_len} is none of {GROUP_LENS}")
        for part in (self.scale, self.offset):
            if part is not None:
                self._check_part(part)
        if columns % self.group_len:
            raise ValueError(f"rows of {columns} weights are not whole groups of {self.group_len}")

    def _check_part(self, part: Scale) -> None:
        rows, columns = self.codes.shape
        groups = (rows, columns // self.group_len)
        if isinstance(part, TwoLevelScale):
            supers = (rows, columns // SUPER_LEN)
            if columns % SUPER_LEN or part.local.shape != groups or part.super_scale.shape != supers:
                raise ValueError(
                    f"two levels {part.super_scale.shape}, {part.local.shape} do not fit codes of shape"
                    f" {self.codes.shape}: groups of {self.group_len} in super-blocks of {SUPER_LEN}"
                )
        elif part.dtype != np.float16 or part.shape != groups:
            raise ValueError(f"{part.dtype} {part.shape} does not fit codes of shape {self.codes.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> np.ndarray:
        """float32 [N, K]. Every format's product of scale and code is exact; only adding the offset rounds."""
        rows, columns = self.shape
        grouped = (rows, columns // self.group_len, self.group_len)
        weights = self.codes.reshape(grouped).astype(np.float32)
        weights -= self.zero[:, :, None] if isinstance(self.zero, np.ndarray) else np.float32(self.zero)
        weights *= scale_values(self.scale)[:, :, None]
        if self.offset is not None:
            weights += scale_values(self.offset)[:, :, None]
        return weights.reshape(rows, columns)

    def take_rows(self, index: np.ndarray | slice) -> "GroupQuantized":
        """The same weights with rows picked by integers or a slice; lossless, since no group crosses a row."""
        scale, offset = _take_rows(self.scale, index), self.offset
        offset = None if offset is None else _take_rows(offset, index)
        zero = self.zero[index] if isinstance(self.zero, np.ndarray) else self.zero
        return GroupQuantized(self.codes[index], scale, offset, zero, self.bits, self.group_len)

    def with_zero_128(self) -> "GroupQuantized":
        """The same weights in 8-bit codes with zero=128. Below 8 bits that is always possible."""
        rows, columns = self.shape
        zero = self.zero[:, :, None] if isinstance(self.zero, np.ndarray) else np.uint8(self.zero)
        grouped = self.codes.reshape(rows, columns // self.group_len, self.group_len)
        codes = (grouped + np.uint8(128) - zero).reshape(rows, columns)
        return GroupQuantized(codes, self.scale, self.offset, 128, 8, self.group_len)

    def is_finite(self) -> bool:
        """Whether no scale and no offset is NaN or infinite."""
        floats = (part.super_scale if isinstance(part, TwoLevelScale) else part for part in (self.scale, self.offset))
        return all(part is None or bool(np.isfinite(part).all()) for part in floats)


def _take_rows(scale: Scale, index: np.ndarray | slice) -> Scale:
    return scale.take_rows(index) if isinstance(scale, TwoLevelScale) else scale[index]


TensorValue = np.ndarray | GroupQuantized
"""A dense array (float32, float16 or bfloat16) or a group-quantised matrix."""


def dense(value: TensorValue) -> np.ndarray:
    """float32 array with the value's exact numbers (dequantised if need be)."""
    if isinstance(value, GroupQuantized):
        return value.dequantize()
    return value.astype(np.float32, copy=False)


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


IQ4_CODES = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)
"""The unevenly spaced values of IQ4_NL and IQ4_XS (`kvalues_iq4nl` in ggml-common.h), plus 128: 8-bit codes."""


def _codebook(packed: np.ndarray) -> np.ndarray:
    return IQ4_CODES[_nibbles(packed)]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Layout of one GGUF block of 32 weights: scale, [offset], [fifth bits], codes. All little-endian, unpadded."""

    bits: int
    """Of a canonical code; the file's may be fewer (IQ4_NL)."""
    zero: int
    has_offset: bool
    code_bytes: int
    """Of one block's codes in the file."""
    decode_codes: Callable[[np.ndarray], np.ndarray]
    """uint8 [blocks, code_bytes] -> codes [blocks, 32]."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return 2 + 2 * self.has_offset + self.code_bytes


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(4, 8, False, 16, _nibbles),
    "Q4_1": BlockFormat(4, 0, True, 16, _nibbles),
    "Q5_0": BlockFormat(5, 16, False, 20, _five_bits),
    "Q5_1": BlockFormat(5, 0, True, 20, _five_bits),
    "Q8_0": BlockFormat(8, 128, False, 32, _bytes),
    "IQ4_NL": BlockFormat(8, 128, False, 16, _codebook),
}


def decode_blocks(format_name: str, raw: np.ndarray, shape: tuple[int, int]) -> GroupQuantized:
    """Raw GGUF blocks (uint8, flat) -> the canonical [N, K] value. `raw` must hold exactly N * K // 32 blocks."""
    layout = BLOCK_FORMATS[format_name]
    rows, columns = shape
    groups = columns // GROUP_LEN
    blocks = raw.reshape(rows * groups, layout.block_bytes)
    scale = _float16_column(blocks, 0).reshape(rows, groups)
    offset = _float16_column(blocks, 2).reshape(rows, groups) if layout.has_offset else None
    codes = layout.decode_codes(blocks[:, 2 + 2 * layout.has_offset :]).reshape(rows, columns)
    return GroupQuantized(codes, scale, offset, layout.zero, layout.bits)


def _float16_column(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0]
