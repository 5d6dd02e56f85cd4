"""K-quants and IQ4_XS are exactly the file's numbers: checked bit by bit against the `gguf` package."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import RawGGUF, RawTensor, model_metadata, random_blocks, random_tensor, tiny_model, value

from strop.core.errors import FormatError
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.k_quants import SUPER_BLOCK_FORMATS, decode_super_blocks
from strop.formats.values import SUPER_LEN, GroupQuantized, TwoLevelScale, dense
from strop.models.reader import ParameterReader, load_spec

FORMATS = list(SUPER_BLOCK_FORMATS)


def oracle(format_name: str, raw: np.ndarray) -> np.ndarray:
    expected: np.ndarray = gguf.dequantize(raw, gguf.GGMLQuantizationType[format_name])
    return expected


def assert_same_bits(left: np.ndarray, right: np.ndarray) -> None:
    assert left.dtype == right.dtype == np.float32
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("format_name", FORMATS)
def test_dequantize_is_bit_exact_against_the_gguf_package(format_name: str) -> None:
    rows, columns = 7, 3 * SUPER_LEN
    raw = random_blocks(format_name, rows, columns)
    decoded = decode_super_blocks(format_name, raw, (rows, columns))
    assert_same_bits(decoded.dequantize(), oracle(format_name, raw).reshape(rows, columns))
    layout = SUPER_BLOCK_FORMATS[format_name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_name]] == (SUPER_LEN, layout.block_bytes)
    assert decoded.bits == (8 if format_name == "IQ4_XS" else int(format_name[1]))
    assert decoded.codes.max() < 1 << decoded.bits


@pytest.mark.parametrize("format_name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_block_with_finite_scales_is_bit_exact(format_name: str, data: st.DataObject) -> None:
    layout = SUPER_BLOCK_FORMATS[format_name]
    raw = np.frombuffer(data.draw(st.binary(min_size=layout.block_bytes, max_size=layout.block_bytes)), np.uint8).copy()
    record = raw.view(layout.fields)
    for name in ("d", "dmin")[: 1 + layout.has_offset]:
        record[name] = data.draw(st.floats(width=16, allow_nan=False, allow_infinity=False))
    assert_same_bits(decode_super_blocks(format_name, raw, (1, SUPER_LEN)).dequantize()[0], oracle(format_name, raw))


@pytest.mark.parametrize("format_name", FORMATS)
def test_both_levels_are_kept_and_their_product_is_exact(format_name: str) -> None:
    raw = random_blocks(format_name, 2, 512)
    layout, records = SUPER_BLOCK_FORMATS[format_name], raw.view(SUPER_BLOCK_FORMATS[format_name].fields)
    decoded = decode_super_blocks(format_name, raw, (2, 512))
    assert isinstance(decoded.scale, TwoLevelScale)
    np.testing.assert_array_equal(decoded.scale.super_scale, records["d"].reshape(2, 2))
    parts = [decoded.scale]
    assert (decoded.offset is not None) == layout.has_offset
    if decoded.offset is not None:
        assert isinstance(decoded.offset, TwoLevelScale)
        np.testing.assert_array_equal(decoded.offset.super_scale, -records["dmin"].reshape(2, 2))
        parts.append(decoded.offset)
    for part in parts:
        exact = part.local.reshape(2, 2, -1).astype(np.float64) * part.super_scale.astype(np.float64)[:, :, None]
        np.testing.assert_array_equal(part.product().astype(np.float64), exact.reshape(2, -1))


def test_the_product_is_exact_at_the_ends_of_both_ranges() -> None:
    ends = np.array([[6e-8, 65504, -65504, 1 + 2**-10]], np.float16)
    for integers in (np.array([-128, -127, 127], np.int8), np.array([0, 63, 255], np.uint8)):
        product = TwoLevelScale(ends, np.tile(integers, (1, 4))).product()
        exact = ends.astype(np.float64)[0][:, None] * integers.astype(np.float64)
        np.testing.assert_array_equal(product.astype(np.float64), exact.reshape(1, -1))


@pytest.mark.parametrize("format_name", FORMATS)
def test_take_rows_is_lossless(format_name: str) -> None:
    decoded = decode_super_blocks(format_name, random_blocks(format_name, 6, 512), (6, 512))
    for index in (np.array([5, 0, 3]), slice(1, 4)):
        taken = decoded.take_rows(index)
        assert isinstance(taken.scale, TwoLevelScale)
        assert_same_bits(taken.dequantize(), decoded.dequantize()[index])


def test_a_file_with_every_format_is_read(tmp_path: Path) -> None:
    names = [*FORMATS, "IQ4_NL"]
    tensors = [random_tensor(name, (3, 512), name, seed) for seed, name in enumerate(names)]
    path = tmp_path / "model.gguf"
    path.write_bytes(RawGGUF([("general.architecture", value("llama"))], tensors).build())
    checkpoint = GGUFCheckpoint(path)
    for raw, name in zip(tensors, names, strict=True):
        assert (checkpoint.tensors[name].format, checkpoint.tensors[name].num_bytes) == (name, len(raw.data))
        expected = oracle(name, np.frombuffer(raw.data, np.uint8)).reshape(3, 512)
        assert_same_bits(dense(checkpoint.read(name)), expected)


def wide_model(weights: str) -> RawGGUF:
    """A model whose every row is one super-block: D 256, F 256, N 4, K 2, H 64."""
    metadata = model_metadata(llama__embedding_length=256, llama__feed_forward_length=256)
    raw = tiny_model(metadata=metadata)
    tensors = []
    for seed, tensor in enumerate(raw.tensors):
        if len(tensor.shape) == 1:
            tensors.append(random_tensor(tensor.name, (256,), "F32", seed))
        else:
            rows = 40 if "token_embd" in tensor.name else 128 if "attn_k" in tensor.name else 256
            rows = 128 if "attn_v" in tensor.name else rows
            tensors.append(random_tensor(tensor.name, (rows, 256), weights, seed))
    return RawGGUF(raw.metadata, tensors)


def open_reader(tmp_path: Path, raw: RawGGUF) -> ParameterReader:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.build())
    checkpoint = GGUFCheckpoint(path)
    return ParameterReader(checkpoint, load_spec(checkpoint))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_whole_model_is_read_and_its_heads_re_ordered(tmp_path: Path, format_name: str) -> None:
    reader = open_reader(tmp_path, wide_model(format_name))
    for path, parameter in reader.read_all():
        assert isinstance(parameter, GroupQuantized) == (len(reader.inventory[path].shape) == 2)
    rows = dense(reader.checkpoint.read("blk.1.attn_q.weight")).reshape(4, 32, 2, 256)
    assert_same_bits(dense(reader.read("layers.1.q")), rows.swapaxes(1, 2).reshape(256, 256))


@pytest.mark.parametrize(("format_name", "field"), [("Q4_K", "d"), ("Q4_K", "dmin"), ("Q6_K", "d"), ("Q2_K", "dmin")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, format_name: str, field: str, bad: float) -> None:
    raw = wide_model(format_name)
    tensor = next(tensor for tensor in raw.tensors if tensor.name == "blk.0.ffn_up.weight")
    data = np.frombuffer(tensor.data, np.uint8).copy()
    data.view(SUPER_BLOCK_FORMATS[format_name].fields)[field][-1] = bad
    tensor.data = data.tobytes()
    reader = open_reader(tmp_path, raw)
    reader.read("layers.0.gate")
    with pytest.raises(FormatError, match=r"'blk\.0\.ffn_up\.weight' holds NaN or infinity"):
        reader.read("layers.0.up")


def test_a_block_too_few_is_refused(tmp_path: Path) -> None:
    data = random_blocks("Q5_K", 2, 512).tobytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(RawGGUF([], [RawTensor("x", (2, 512), 13, data[:-176])]).build()[:-16])
    with pytest.raises(FormatError, match="'x' ends at byte"):
        GGUFCheckpoint(path)
