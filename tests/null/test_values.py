"""Canonical values are exactly the file's numbers: checked bit by bit against the `gguf` package."""

import gguf
import numpy as np
import pytest
from tiny_gguf import random_blocks

from strop.formats.values import BLOCK_FORMATS, GroupQuantized, TwoLevelScale, decode_blocks, dense


@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_dequantize_is_bit_exact_against_the_gguf_package(format_name: str) -> None:
    rows, columns = 7, 96
    raw = random_blocks(format_name, rows, columns)
    value = decode_blocks(format_name, raw, (rows, columns))
    oracle = gguf.dequantize(raw, gguf.GGMLQuantizationType[format_name]).reshape(rows, columns)
    assert value.dequantize().dtype == np.float32
    np.testing.assert_array_equal(value.dequantize().view(np.uint32), oracle.view(np.uint32))
    assert value.shape == (rows, columns)
    assert value.codes.max() < 1 << value.bits
    assert value.bits == (8 if format_name == "IQ4_NL" else int(format_name[1]))


@pytest.mark.parametrize("format_name", BLOCK_FORMATS)
def test_take_rows_is_lossless(format_name: str) -> None:
    value = decode_blocks(format_name, random_blocks(format_name, 6, 64), (6, 64))
    index = np.array([5, 0, 3])
    np.testing.assert_array_equal(value.take_rows(index).dequantize(), value.dequantize()[index])


def test_parts_that_do_not_fit_are_refused() -> None:
    codes, scale = np.zeros((2, 64), np.uint8), np.zeros((2, 2), np.float16)
    GroupQuantized(codes, scale, None, 8, 4)
    with pytest.raises(ValueError, match="does not fit"):
        GroupQuantized(codes, scale[:, :1], None, 8, 4)
    with pytest.raises(ValueError, match="whole groups"):
        GroupQuantized(codes[:, :33], scale[:, :1], None, 8, 4)
    with pytest.raises(ValueError, match=r"zero is uint8 \(2, 1\)"):
        GroupQuantized(codes, scale, None, np.zeros((2, 1), np.uint8), 4)
    with pytest.raises(ValueError, match="zero is int64"):
        GroupQuantized(codes, scale, None, np.zeros((2, 2), np.int64), 4)
    with pytest.raises(ValueError, match="zero is uint8"):
        GroupQuantized(codes, scale, scale, np.zeros((2, 2), np.uint8), 4)
    with pytest.raises(ValueError, match="bits=7"):
        GroupQuantized(codes, scale, None, 0, 7)
    with pytest.raises(ValueError, match="group_len=48"):
        GroupQuantized(codes, scale, None, 0, 4, 48)
    with pytest.raises(ValueError, match="does not fit"):
        GroupQuantized(codes, scale, None, 0, 4, 16)


def test_two_levels_that_do_not_fit_are_refused() -> None:
    codes = np.zeros((2, 512), np.uint8)
    upper, local = np.zeros((2, 2), np.float16), np.zeros((2, 16), np.int8)
    GroupQuantized(codes, TwoLevelScale(upper, local), None, 0, 4)
    GroupQuantized(codes, TwoLevelScale(upper, np.zeros((2, 32), np.uint8)), None, 0, 4, 16)
    with pytest.raises(ValueError, match="super-blocks of 256"):
        GroupQuantized(codes, TwoLevelScale(upper, local), None, 0, 4, 16)
    with pytest.raises(ValueError, match="super-blocks of 256"):
        GroupQuantized(codes, TwoLevelScale(upper, local[:, :14]), None, 0, 4)
    with pytest.raises(ValueError, match="super-blocks of 256"):
        GroupQuantized(codes[:, :96], TwoLevelScale(upper[:, :1], local[:, :3]), None, 0, 4)
    with pytest.raises(ValueError, match="does not fit super_scale"):
        TwoLevelScale(upper[:1], local)
    with pytest.raises(ValueError, match="whole super-blocks"):
        TwoLevelScale(upper, local[:, :15])
    with pytest.raises(ValueError, match="float32"):
        TwoLevelScale(upper.astype(np.float32), local)
    with pytest.raises(ValueError, match="int32"):
        TwoLevelScale(upper, local.astype(np.int32))


def test_dense_keeps_float32_and_widens_the_rest() -> None:
    single = np.ones((2, 2), np.float32)
    assert dense(single) is single
    assert dense(single.astype(np.float16)).dtype == np.float32
