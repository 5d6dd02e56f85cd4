"""Packed weights on a mesh: which tiles of 16 rows, and which bytes of a tile, each device gets."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from strop.core.errors import UnsupportedError
from strop.models.mesh import Axis, MeshShape
from strop.ops.weights import GROUP_LEN, PACKED_FORMATS, SUPER_LEN, TILE_COLUMNS, PackedFormat, Weight


def take_rows(weight: Weight, first: int, count: int) -> Weight:
    """So many rows of each matrix, from whole tiles."""
    assert first % TILE_COLUMNS == 0 and count % TILE_COLUMNS == 0
    tile_bytes = PACKED_FORMATS[weight.format].tile_bytes(weight.shape[1])
    some = slice(first // TILE_COLUMNS * tile_bytes, (first + count) // TILE_COLUMNS * tile_bytes)
    return Weight(np.asarray(weight.data)[:, some], weight.format, (count, weight.shape[1]))


def pad_rows(weight: Weight, num_shards: int) -> Weight:
    """Matrices with rows of zeros below, until their tiles can be shared out evenly."""
    tile_bytes = PACKED_FORMATS[weight.format].tile_bytes(weight.shape[1])
    missing = -weight.num_tiles % num_shards
    data = np.asarray(weight.data)
    if missing:  # else it stays where it is
        data = np.pad(data, ((0, 0), (0, missing * tile_bytes)))
    return Weight(data, weight.format, ((weight.num_tiles + missing) * TILE_COLUMNS, weight.shape[1]))


class Shards(NamedTuple):
    """Matrices [L, bytes] as devices share them."""

    shape: tuple[int, int]
    """(N, K) of a device's part of a matrix."""
    num_shards: int
    shard_bytes: int
    """Of a device's part of a matrix."""
    make: Callable[[int], np.ndarray]
    """The i-th shard uint8 [L, shard_bytes]; those of neighbouring columns follow each other."""


def by_shard(
    name: str, weight: Weight, rows_over: Sequence[Axis], columns_over: Sequence[Axis], mesh: MeshShape
) -> Shards:
    """How devices share matrices whose rows and columns are sharded over these axes.

    Raises:
        UnsupportedError: a shard is not whole tiles, or not whole groups of weights that share a scale.
    """
    (num_rows, k_len), packed = weight.shape, PACKED_FORMATS[weight.format]
    row_shards, column_shards = mesh.size(rows_over), mesh.size(columns_over)
    _check(name, "rows", num_rows, row_shards, TILE_COLUMNS)
    _check(name, "columns", k_len, column_shards, packed.group_len * (2 if packed.in_pairs else 1))
    tiles = np.asarray(weight.data).reshape(weight.data.shape[0], row_shards, -1, packed.tile_bytes(k_len))
    shape = num_rows // row_shards, k_len // column_shards

    def make(i: int) -> np.ndarray:
        row, column = divmod(i, column_shards)
        return _take_columns(tiles[:, row], packed, k_len, column, column_shards).reshape(len(tiles), -1)

    return Shards(shape, row_shards * column_shards, tiles.shape[2] * packed.tile_bytes(shape[1]), make)


def _take_columns(tiles: np.ndarray, packed: PackedFormat, k_len: int, i: int, num_shards: int) -> np.ndarray:
    """Tiles [..., bytes] of the i-th of so many equal ranges of columns."""
    if num_shards == 1:
        return tiles
    parts, at = [], 0
    for length in _section_bytes(packed, k_len):
        own = length // num_shards
        parts.append(tiles[..., at + i * own : at + (i + 1) * own])
        at += length
    joined = np.concatenate(parts, axis=-1)
    missing = packed.tile_bytes(k_len // num_shards) - joined.shape[-1]
    return np.pad(joined, [(0, 0)] * (joined.ndim - 1) + [(0, missing)])


def join_columns(shards: jax.Array, format_name: str, k_len: int) -> jax.Array:
    """Tiles [n, bytes] of all columns, from those [S, n, bytes] of S neighbouring ranges of `k_len` columns."""
    packed, (num_shards, num_tiles, _) = PACKED_FORMATS[format_name], shards.shape
    sections, at = [], 0
    for length in _section_bytes(packed, k_len):
        sections.append(jnp.moveaxis(shards[..., at : at + length], 0, 1).reshape(num_tiles, -1))
        at += length
    joined = jnp.concatenate(sections, axis=1)
    return jnp.pad(joined, ((0, 0), (0, packed.tile_bytes(num_shards * k_len) - joined.shape[1])))


def _section_bytes(packed: PackedFormat, k_len: int) -> list[int]:
    """Of the parts of a tile, in each of which columns follow one another (strop.models.packing)."""
    if not packed.quantized:
        return [k_len * TILE_COLUMNS * packed.bits // 8]
    num_arrays, groups = 1 + packed.has_offset, k_len // GROUP_LEN
    codes = groups * packed.bits * GROUP_LEN * TILE_COLUMNS // 8
    if packed.two_level:
        supers = k_len // SUPER_LEN
        return [codes, *[groups * TILE_COLUMNS] * num_arrays, *[supers * TILE_COLUMNS * 2] * num_arrays]
    return [codes, *[groups * TILE_COLUMNS * 2] * num_arrays]


def _check(name: str, what: str, length: int, num_shards: int, unit: int) -> None:
    if length % (num_shards * unit):
        raise UnsupportedError(
            f"{name}: {length} {what}, packed {unit} together, do not divide over {num_shards} devices; a divisor of"
            f" {length // unit} would: take another mesh, or STROP_NATIVE=0 for dense weights"
        )
