"""Packed tiles hold the very numbers of the canonical values, read back here as linear.h lays them out."""

import ml_dtypes
import numpy as np
import pytest
from tiny_gguf import random_blocks

from strop.formats.k_quants import SUPER_BLOCK_FORMATS, decode_super_blocks
from strop.formats.values import BLOCK_FORMATS, GroupQuantized, TensorValue, TwoLevelScale, decode_blocks, dense
from strop.models.packing import common_format, convert, pack, packed_bytes, packed_format
from strop.ops.weights import PACKED_FORMATS

EXPECTED = {
    "Q4_0": "q4",
    "Q4_1": "q4_offset",
    "Q5_0": "q5",
    "Q5_1": "q5_offset",
    "Q8_0": "q8",
    "IQ4_NL": "q8",
    "MXFP4": "q8",
    "Q4_K": "q4_two_level",
    "Q5_K": "q5_two_level",
    "IQ4_XS": "q8_two_level",
    "Q6_K": "q8",
    "Q3_K": "q8",
    "Q2_K": "q8_offset",
}
EXACT = [name for name in EXPECTED if name not in ("Q6_K", "Q3_K", "Q2_K")]


def decode(format_name: str, rows: int, columns: int, seed: int = 0) -> GroupQuantized:
    raw = random_blocks(format_name, rows, columns, seed)
    by_blocks = decode_super_blocks if format_name in SUPER_BLOCK_FORMATS else decode_blocks
    return by_blocks(format_name, raw, (rows, columns))


def packed(parts: list[TensorValue], format_name: str, *, interleave: bool = False) -> np.ndarray:
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    out = np.full(packed_bytes(format_name, *shape), 0xAA, np.uint8)
    pack(parts, format_name, out, interleave=interleave)
    return out.reshape(-1, PACKED_FORMATS[format_name].tile_bytes(shape[1]))


def unpacked(tiles: np.ndarray, format_name: str, k_len: int) -> np.ndarray:
    """float32 [tiles * 16, K] of quantised tiles, number by number."""
    layout = PACKED_FORMATS[format_name]
    groups = k_len // 32
    rows = np.empty((len(tiles) * 16, k_len), np.float32)
    for row in range(len(rows)):
        tile, column = tiles[row // 16], row % 16
        scales = tile[groups * layout.bits * 64 :]

        def half(place: int, column: int = column, scales: np.ndarray = scales) -> np.float32:
            at = (place * 16 + column) * 2
            return np.float32(scales[at : at + 2].view(np.float16)[0])

        def scale(part: int, group: int, column: int = column, scales: np.ndarray = scales) -> np.float32:
            if not layout.two_level:
                return half(part * groups + group)
            local = scales[(part * groups + group) * 16 + column]
            number = np.float32(local if layout.has_offset else local.view(np.int8))
            num_parts = 1 + layout.has_offset
            return number * half(num_parts * groups // 2 + part * groups // 8 + group // 8)

        for group in range(groups):
            codes = tile[group * layout.bits * 64 :]
            for k in range(32):
                byte = codes[(k if layout.bits == 8 else k % 16) // 4 * 64 + column * 4 + k % 4]
                code = int(byte) if layout.bits == 8 else int(byte) >> 4 * (k // 16) & 15
                if layout.bits == 5:
                    bit = k // 4 * 64 + column * 4 + k % 4
                    code += 16 * (int(codes[256 + bit // 8]) >> bit % 8 & 1)
                weight = scale(0, group) * np.float32(code - layout.zero)
                offset = scale(1, group) if layout.has_offset else np.float32(0)
                rows[row, group * 32 + k] = weight + (scale(0, group) * offset if layout.has_zeros else offset)
    return rows


@pytest.mark.parametrize("format_name", EXACT)
def test_tiles_give_back_every_number(format_name: str) -> None:
    value = decode(format_name, 20, 512)
    name = packed_format(value)
    converted, error = convert(value, name)
    assert (name, error) == (EXPECTED[format_name], None)
    rows = unpacked(packed([converted], name), name, 512)
    np.testing.assert_array_equal(rows[:20], value.dequantize())
    assert not rows[20:].any()  # padding


@pytest.mark.parametrize("format_name", ["Q6_K", "Q3_K", "Q2_K"])
def test_what_has_no_kernel_becomes_eight_bit_groups_with_a_receipt(format_name: str) -> None:
    value = decode(format_name, 20, 512)
    name = packed_format(value)
    converted, error = convert(value, name)
    assert name == EXPECTED[format_name]
    assert error is not None
    assert 0 < error.rms < error.largest < 0.5 / 127 * (1 + 2**-9)
    rows = unpacked(packed([converted], name), name, 512)[:20]
    np.testing.assert_array_equal(rows, dense(converted))
    exact = value.dequantize()
    largest = np.abs(exact).reshape(20, -1, 32).max(axis=-1, keepdims=True)
    assert (np.abs(rows - exact).reshape(20, -1, 32) <= 1.001 * error.largest * largest).all()


def test_an_offset_that_does_not_help_is_packed_nevertheless() -> None:
    """The format must be known before the numbers are."""
    codes = np.tile(np.array([0, 254], np.uint8), (16, 128))
    ones = np.ones((16, 16), np.uint8)
    scale, offset = (TwoLevelScale(np.full((16, 1), number, np.float16), ones) for number in (1, -127))
    value = GroupQuantized(codes, scale, offset, 0, 8, 16)
    converted, error = convert(value, packed_format(value))
    assert error is not None
    assert error.largest == 0
    assert packed_format(converted) == packed_format(value) == "q8_offset"
    np.testing.assert_array_equal(unpacked(packed([converted], "q8_offset"), "q8_offset", 256), value.dequantize())


@pytest.mark.parametrize("format_name", EXACT)
@pytest.mark.parametrize("num_rows", [32, 24], ids=["whole tiles", "part of a tile"])
def test_parts_follow_one_another(format_name: str, num_rows: int) -> None:
    parts = [decode(format_name, num_rows, 256, seed) for seed in range(2)]
    name = packed_format(parts[0])
    rows = unpacked(packed(list(parts), name), name, 256)
    np.testing.assert_array_equal(rows[: 2 * num_rows], np.concatenate([part.dequantize() for part in parts]))


def test_tiles_of_gate_and_up_alternate() -> None:
    gate, up = decode("Q4_K", 32, 256), decode("Q5_K", 32, 256)
    name = common_format([packed_format(gate), packed_format(up)])
    assert name == "q5_two_level"
    rows = unpacked(packed([convert(part, name)[0] for part in (gate, up)], name, interleave=True), name, 256)
    both = rows.reshape(2, 2, 16, 256)
    np.testing.assert_array_equal(both[:, 0].reshape(32, 256), gate.dequantize())
    np.testing.assert_array_equal(both[:, 1].reshape(32, 256), up.dequantize())


def test_common_formats() -> None:
    assert common_format(["q4", "q5"]) == "q8"  # their zeros differ
    assert common_format(["q4_offset", "q5_offset"]) == "q5_offset"
    assert common_format(["q4_two_level", "q5_two_level"]) == "q5_two_level"
    assert common_format(["q4", "q8", "q5_offset"]) == "q8_offset"
    assert common_format(["bf16", "bf16"]) == "bf16"
    for other in ("q8", "q8_two_level", "f16"):
        assert common_format(["q4_two_level", other]) == "f32"


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_by_group(bits: int) -> None:
    rng = np.random.default_rng(0)
    codes, zero = (rng.integers(0, 1 << bits, (20, length), np.uint8) for length in (64, 2))
    value = GroupQuantized(codes, rng.random((20, 2)).astype(np.float16), None, zero, bits)
    name = packed_format(value)
    assert name == f"q{bits}_zeros"
    tiles = packed([value], name)
    offsets = tiles[:, -64:].copy().view(np.float16).reshape(-1, 2, 16).transpose(0, 2, 1).reshape(-1, 2)
    np.testing.assert_array_equal(offsets[:20], -zero.astype(np.float16))
    np.testing.assert_array_equal(unpacked(tiles, name, 64)[:20], value.dequantize())


def test_dense_values_are_kept() -> None:
    numbers = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    for dtype, name in ((np.float32, "f32"), (np.float16, "f16"), (ml_dtypes.bfloat16, "bf16")):
        value = numbers.astype(dtype)
        assert packed_format(value) == name
        assert convert(value, name)[0] is value
        assert dense(convert(value, "f32")[0]).tobytes() == dense(value).tobytes()


@pytest.mark.parametrize("format_name", [*BLOCK_FORMATS, *SUPER_BLOCK_FORMATS])
def test_sizes(format_name: str) -> None:
    """Bits of a weight, scales included, for rows of 4096: 16 rows are a whole number of cache lines."""
    bits = packed_bytes(EXPECTED[format_name], 16, 4096) * 8 / (16 * 4096)
    name = EXPECTED[format_name]
    scale_bits = (8 / 32 + 16 / 256) if "two_level" in name else 16 / 32
    has_offset = PACKED_FORMATS[name].has_offset
    assert bits == PACKED_FORMATS[name].bits + scale_bits * (1 + has_offset)
