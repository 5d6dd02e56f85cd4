"""The tagged weight leaf: a new format is a new tag, not a new tree."""

from dataclasses import dataclass, field

import jax
import numpy as np

TILE_COLUMNS = 16
GROUP_LEN = 32


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """A weight format of the native kernels (native/kernels/linear.h states the byte layout)."""

    code: int
    bits: int
    zero: int = 0
    has_offset: bool = False

    @property
    def quantized(self) -> bool:
        """Whether groups of integers share a scale."""
        return self.bits <= 8

    def tile_bytes(self, k_len: int) -> int:
        """Bytes of 16 columns of [N, K], padded to 64."""
        if self.quantized:
            num_bytes = k_len * TILE_COLUMNS * self.bits // 8 + k_len // GROUP_LEN * 32 * (1 + self.has_offset)
        else:
            num_bytes = (k_len + (k_len % 2 if self.code == 4 else 0)) * TILE_COLUMNS * self.bits // 8
        return -(-num_bytes // 64) * 64


PACKED_FORMATS = {
    "q4": PackedFormat(0, 4, zero=8),
    "q4_offset": PackedFormat(1, 4, has_offset=True),
    "q8": PackedFormat(2, 8, zero=128),
    "q8_zero16": PackedFormat(2, 8, zero=16),
    "q8_offset": PackedFormat(3, 8, has_offset=True),
    "bf16": PackedFormat(4, 16),
    "f16": PackedFormat(5, 16),
    "f32": PackedFormat(6, 32),
    "q4_zeros": PackedFormat(7, 4, has_offset=True),
    "q8_zeros": PackedFormat(8, 8, has_offset=True),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """L matrices of one role, format and shape, stacked.

    `format` is "dense" (data [L, N, K], any float dtype) or a key of PACKED_FORMATS (data uint8 [L, tiles * bytes]).
    For a gated MLP, N holds the F gate rows and then the F up rows; a packed weight alternates their tiles.
    """

    data: jax.Array | np.ndarray
    format: str = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})
    """(N, K) of one matrix."""

    @property
    def num_tiles(self) -> int:
        """Tiles of 16 rows in one matrix."""
        return int(self.data.shape[1]) // PACKED_FORMATS[self.format].tile_bytes(self.shape[1])

    @property
    def bytes_per_matrix(self) -> int:
        """As stored, padding included."""
        return int(np.prod(self.data.shape[1:])) * self.data.dtype.itemsize
