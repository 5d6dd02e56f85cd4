"""The tagged weight leaf: a new format is a new tag, not a new tree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

TILE_COLUMNS = 16
GROUP_LEN = 32
SUPER_LEN = 256


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """A weight format of the native kernels (native/kernels/linear.h states the byte layout)."""

    code: int
    bits: int
    zero: int = 0
    has_offset: bool = False
    two_level: bool = False
    """Scales are a half per 256 weights times an integer per group."""
    has_zeros: bool = False
    """The offset is of the codes: minus a zero per group."""
    in_pairs: bool = False
    """Neighbours in K lie together."""

    @property
    def quantized(self) -> bool:
        """Whether groups of integers share a scale."""
        return self.bits <= 8

    @property
    def group_len(self) -> int:
        """K is a multiple of it."""
        return 1 if not self.quantized else SUPER_LEN if self.two_level else GROUP_LEN

    def tile_bytes(self, k_len: int) -> int:
        """Bytes of 16 columns of [N, K], padded to 64."""
        if self.quantized:
            scale_bytes = k_len // GROUP_LEN * (1 if self.two_level else 2) + self.two_level * k_len // SUPER_LEN * 2
            num_bytes = (k_len * self.bits // 8 + scale_bytes * (1 + self.has_offset)) * TILE_COLUMNS
        else:
            num_bytes = (k_len + k_len % 2 * self.in_pairs) * TILE_COLUMNS * self.bits // 8
        return -(-num_bytes // 64) * 64


PACKED_FORMATS = {
    "q4": PackedFormat(0, 4, zero=8),
    "q4_offset": PackedFormat(1, 4, has_offset=True),
    "q4_two_level": PackedFormat(2, 4, has_offset=True, two_level=True),
    "q4_zeros": PackedFormat(3, 4, has_offset=True, has_zeros=True),
    "q5": PackedFormat(4, 5, zero=16),
    "q5_offset": PackedFormat(5, 5, has_offset=True),
    "q5_two_level": PackedFormat(6, 5, has_offset=True, two_level=True),
    "q8": PackedFormat(7, 8, zero=128),
    "q8_offset": PackedFormat(8, 8, has_offset=True),
    "q8_two_level": PackedFormat(9, 8, zero=128, two_level=True),
    "q8_zeros": PackedFormat(10, 8, has_offset=True, has_zeros=True),
    "bf16": PackedFormat(11, 16, in_pairs=True),
    "f16": PackedFormat(12, 16),
    "f32": PackedFormat(13, 32),
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
    def parts(self) -> tuple["Weight", ...]:
        """Itself alone: see SplitWeight."""
        return (self,)

    @property
    def num_tiles(self) -> int:
        """Tiles of 16 rows in one matrix."""
        return int(self.data.shape[1]) // PACKED_FORMATS[self.format].tile_bytes(self.shape[1])

    @property
    def bytes_per_matrix(self) -> int:
        """As stored, padding included."""
        return int(np.prod(self.data.shape[1:])) * self.data.dtype.itemsize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitWeight:
    """Matrices whose rows lie in several weights, one after the other, as their formats differ."""

    parts: tuple[Weight, ...]
    """All but the last have a multiple of TILE_COLUMNS rows; never of a gated MLP."""

    @property
    def format(self) -> str:
        """Those of the parts, joined by +."""
        return "+".join(part.format for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one matrix."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def bytes_per_matrix(self) -> int:
        """As stored, padding included."""
        return sum(part.bytes_per_matrix for part in self.parts)


AnyWeight = Weight | SplitWeight


def join_parts(parts: Sequence[Weight]) -> AnyWeight:
    """One weight of all the rows."""
    return parts[0] if len(parts) == 1 else SplitWeight(tuple(parts))
