"""Rounding to 8-bit groups: the reported error is the real one, and no larger than the step allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import random_blocks

from strop.core.errors import UnsupportedError
from strop.formats import eight_bit_groups
from strop.formats.eight_bit_groups import rounding_error, to_eight_bit_groups
from strop.formats.k_quants import SUPER_BLOCK_FORMATS, decode_super_blocks
from strop.formats.values import BLOCK_FORMATS, GroupQuantized, TwoLevelScale, decode_blocks

HALF_STEP = 0.5 / 127 * (1 + 2**-9)
"""Of the group's largest weight; the float16 scale may be too short or too long by 2**-11."""


def errors(exact: GroupQuantized, rounded: GroupQuantized) -> np.ndarray:
    """float64 [N * K // 32, 32], by the definition."""
    true = exact.dequantize().astype(np.float64).reshape(-1, 32)
    found = rounded.dequantize().astype(np.float64).reshape(-1, 32)
    largest = np.abs(true).max(axis=1, keepdims=True)
    return np.abs(found - true) / np.where(largest == 0, 1, largest)


def check_form(rounded: GroupQuantized) -> None:
    assert isinstance(rounded.scale, np.ndarray)
    assert (rounded.bits, rounded.group_len) == (8, 32)
    assert rounded.zero == (128 if rounded.offset is None else 0)


@pytest.mark.parametrize("format_name", SUPER_BLOCK_FORMATS)
def test_the_error_is_bounded_and_reported(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = decode_super_blocks(format_name, random_blocks(format_name, 9, 512), (9, 512))
    rounded, error = to_eight_bit_groups(exact)
    check_form(rounded)
    found = errors(exact, rounded)
    assert error.largest == pytest.approx(found.max(), rel=1e-3)
    assert error.rms == pytest.approx(np.sqrt(np.mean(found**2)), rel=1e-3)
    assert 0 < error.rms < error.largest <= HALF_STEP
    monkeypatch.setattr(eight_bit_groups, "_CHUNK_WEIGHTS", 1024)  # two rows at a time, and one left over
    again, again_error = to_eight_bit_groups(exact)
    np.testing.assert_array_equal(again.dequantize(), rounded.dequantize())
    assert again_error.rms == pytest.approx(error.rms, rel=1e-9)


@pytest.mark.parametrize("format_name", ["Q4_K", "Q5_K", "IQ4_XS"])
def test_groups_of_32_keep_their_codes(format_name: str) -> None:
    exact = decode_super_blocks(format_name, random_blocks(format_name, 4, 512), (4, 512))
    rounded, error = to_eight_bit_groups(exact)
    np.testing.assert_array_equal(rounded.codes, exact.codes)
    assert error.rms < 2**-12


@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_one_level_of_scales_costs_nothing(format_name: str) -> None:
    exact = decode_blocks(format_name, random_blocks(format_name, 4, 64), (4, 64))
    rounded, error = to_eight_bit_groups(exact)
    check_form(rounded)
    assert (error.rms, error.largest) == (0, 0)
    np.testing.assert_array_equal(rounded.dequantize(), exact.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_by_group_cost_nothing_below_8_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (4, 64)).astype(np.uint8)
    zero = rng.integers(0, 1 << bits, (4, 2)).astype(np.uint8)
    exact = GroupQuantized(codes, np.full((4, 2), 0.37, np.float16), None, zero, bits)
    rounded, error = to_eight_bit_groups(exact)
    check_form(rounded)
    assert error.largest == pytest.approx(errors(exact, rounded).max(), rel=1e-3)
    assert error.largest <= (0 if bits == 4 else HALF_STEP)


def sixteens(codes: np.ndarray, scale: float, offset: float | None = None) -> GroupQuantized:
    """Codes [1, 256] with one scale, and perhaps one offset, for all groups of 16."""

    def two_level(number: float) -> TwoLevelScale:
        return TwoLevelScale(np.full((1, 1), number, np.float16), np.ones((1, 16), np.uint8))

    return GroupQuantized(codes, two_level(scale), None if offset is None else two_level(offset), 0, 8, 16)


def test_an_offset_is_kept_only_where_it_helps() -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    one_sided, _ = to_eight_bit_groups(sixteens(codes, 0.01, 100.0))
    assert one_sided.offset is not None
    centred, _ = to_eight_bit_groups(sixteens(np.tile(np.array([0, 254], np.uint8), (1, 128)), 1.0, -127.0))
    assert centred.offset is None


@settings(max_examples=60, deadline=None)
@given(
    st.binary(min_size=256, max_size=256),
    st.floats(-2, 2, width=16),
    st.one_of(st.none(), st.floats(-300, 300, width=16)),
)
def test_any_codes_and_scales(codes: bytes, scale: float, offset: float | None) -> None:
    exact = sixteens(np.frombuffer(codes, np.uint8)[None], scale, offset)
    rounded, error = to_eight_bit_groups(exact)
    check_form(rounded)
    # Where float16 has only subnormals, a scale is off by up to 2**-25, times 127.
    smallest = np.abs(exact.dequantize()).max(initial=0)
    assert error.largest <= HALF_STEP or smallest < 2**-7
    assert error.largest <= 1
    assert rounded.is_finite()


def test_zeros_stay_zeros() -> None:
    rounded, error = to_eight_bit_groups(sixteens(np.zeros((1, 256), np.uint8), 1.0))
    assert not rounded.dequantize().any()
    assert error.largest == 0


def test_what_float16_cannot_hold_is_refused() -> None:
    huge = GroupQuantized(
        np.full((1, 256), 255, np.uint8),
        TwoLevelScale(np.full((1, 1), 65504, np.float16), np.full((1, 16), 127, np.int8)),
        None,
        0,
        8,
        16,
    )
    with pytest.raises(UnsupportedError, match="at most 65504"):
        to_eight_bit_groups(huge)


def test_half_a_group_is_refused() -> None:
    odd = GroupQuantized(np.zeros((1, 48), np.uint8), np.ones((1, 3), np.float16), None, 0, 4, 16)
    with pytest.raises(ValueError, match="rows of 48"):
        to_eight_bit_groups(odd)


def test_the_error_of_a_known_change() -> None:
    exact = GroupQuantized(np.full((1, 32), 4, np.uint8), np.ones((1, 1), np.float16), None, 0, 8)
    codes = exact.codes.copy()
    codes[0, 0] = 3
    error = rounding_error(exact, GroupQuantized(codes, np.ones((1, 1), np.float16), None, 0, 8))
    assert error.largest == 0.25
    assert error.rms == pytest.approx(0.25 / np.sqrt(32))
