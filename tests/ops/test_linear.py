"""Linear layers: every ISA against exact arithmetic, and against itself for any number of rows and threads."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_weights import fitting, make, packed

from strop.formats.values import dense
from strop.models.packing import common_format, convert, packed_format
from strop.ops import native
from strop.ops.embed import embed
from strop.ops.linear import linear
from strop.ops.norm import Norm
from strop.ops.weights import PACKED_FORMATS, SplitWeight, Weight

ROWS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 25, 33, 64)


def as_kernel_sees(x, weight):
    """The activations after the rounding the format's kernel states, in float64."""
    if PACKED_FORMATS[weight.format].quantized:
        groups = x.reshape(len(x), -1, 32)
        largest = np.abs(groups).max(-1, keepdims=True)
        inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, np.float32(1e-30)), np.float32(0))
        return (np.rint(groups * inverse).astype(np.float64) * (largest / np.float32(127))).reshape(x.shape)
    if weight.format == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    return x.astype(np.float64)


def compiled(weight, **options):
    """A function of x and the number of rows in use; one compilation serves them all."""
    step = jax.jit(lambda x, w, counts: linear(x, w, 0, counts, platform="native", **options))

    def run(x, num_rows=None):
        num_rows = len(x) if num_rows is None else num_rows
        return np.asarray(step(jnp.asarray(x), weight, jnp.array([num_rows, 0], jnp.int32)))[:num_rows]

    return run


def call(x, weight, **options):
    return compiled(weight, **options)(x)


@pytest.mark.parametrize("format_name", list(PACKED_FORMATS))
@pytest.mark.parametrize("shape", [(64, 96), (960, 576), (50, 64), (16, 1536)], ids=str)
def test_product_is_exact_and_rows_are_independent(isa, format_name, shape):
    rng = np.random.default_rng(1)
    num_columns, k_len = shape[0], fitting(format_name, shape[1])
    value = make(rng, format_name, num_columns, k_len)
    weight = packed([value])
    assert weight.format == format_name
    x = rng.standard_normal((max(ROWS), k_len)).astype(np.float32)
    x[3] = 0  # a row whose scale is 0
    expected = as_kernel_sees(x, weight) @ dense(value).astype(np.float64).T
    run = compiled(weight)
    whole = run(x)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    for num_rows in ROWS:
        np.testing.assert_array_equal(run(x, num_rows), whole[:num_rows])


@pytest.mark.parametrize("format_name", ["q4_offset", "q4_two_level", "q5"])
def test_threads_do_not_change_a_bit(isa, format_name):
    rng = np.random.default_rng(2)
    k_len = fitting(format_name, 576)
    weight = packed([make(rng, format_name, 960, k_len)])
    x = rng.standard_normal((37, k_len)).astype(np.float32)
    native.set_num_threads(1)
    alone = call(x, weight)
    native.set_num_threads(3)
    try:
        np.testing.assert_array_equal(call(x, weight), alone)
    finally:
        native.set_num_threads(1)


@pytest.mark.parametrize("format_name", ["q4_offset", "q5_two_level", "q8", "f32"])
def test_norm_bias_residual_and_gate_fuse(isa, format_name):
    rng = np.random.default_rng(3)
    k_len, n_len = fitting(format_name, 96), 64
    x = rng.standard_normal((9, k_len)).astype(np.float32)
    norm = Norm("rms", jnp.asarray(rng.standard_normal((2, k_len)), jnp.float32), None, 1e-5, 1)
    scale = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + 1e-5)
    normed = (x * scale * np.asarray(norm.weight)[1]).astype(np.float32)
    value = make(rng, format_name, n_len, k_len)
    weight = packed([value])
    bias = rng.standard_normal((2, n_len)).astype(np.float32)
    residual = rng.standard_normal((9, n_len)).astype(np.float32)
    product = as_kernel_sees(normed, weight) @ dense(value).astype(np.float64).T
    found = call(x, weight, layer=1, norm=norm, bias=jnp.asarray(bias), residual=jnp.asarray(residual))
    # Rounding may flip where the norm lands between two codes: allow one step of a few.
    tolerance = 2e-2 if PACKED_FORMATS[format_name].quantized else 1e-5
    np.testing.assert_allclose(found, product + bias[1] + residual, atol=tolerance, rtol=0)

    up = make(rng, format_name, n_len, k_len)
    both = packed([value, up], interleave=True)
    gate = as_kernel_sees(x, weight) @ dense(value).astype(np.float64).T
    expected = gate / (1 + np.exp(-gate)) * (as_kernel_sees(x, weight) @ dense(up).astype(np.float64).T)
    np.testing.assert_allclose(
        call(x, both, activation="silu", gated=True), expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )


@pytest.mark.parametrize("format_name", list(PACKED_FORMATS))
def test_embedding_rows_are_the_weights_own(isa, format_name):
    rng = np.random.default_rng(4)
    value = make(rng, format_name, 50, fitting(format_name, 64))
    tokens = jnp.asarray([0, 49, 17, 17, 31], jnp.int32)
    rows = embed(tokens, packed([value]), jnp.array([5, 0], jnp.int32), platform="native")
    np.testing.assert_array_equal(np.asarray(rows), dense(value)[np.asarray(tokens)])
    residual, bias = (rng.standard_normal((rows, value.shape[1])).astype(np.float32) for rows in (5, 1))
    sums = embed(
        tokens, packed([value]), jnp.array([5, 0], jnp.int32), platform="native", scale=3.0, bias=jnp.asarray(bias),
        residual=jnp.asarray(residual),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(sums), residual + (np.float32(3) * np.asarray(rows) + bias))


@pytest.mark.parametrize(
    "formats", [("q4_two_level", "q8"), ("q8", "q4", "q8_two_level"), ("q5_two_level", "f16")], ids="+".join
)
def test_a_split_weight_gives_the_bits_of_its_parts(isa, formats):
    rng = np.random.default_rng(7)
    weights = [packed([make(rng, name, rows, 512)]) for name, rows in zip(formats, (48, 16, 20), strict=False)]
    ends = np.cumsum([weight.shape[0] for weight in weights])
    x = rng.standard_normal((9, 512)).astype(np.float32)
    bias = rng.standard_normal((2, -(-ends[-1] // 16) * 16)).astype(np.float32)
    residual = rng.standard_normal((9, ends[-1])).astype(np.float32)
    norm = Norm("rms", jnp.asarray(rng.standard_normal((2, 512)), jnp.float32), None, 1e-5, 1)
    options = {"layer": 1, "norm": norm, "activation": "relu", "scale": 0.5}
    found = call(x, SplitWeight(tuple(weights)), bias=jnp.asarray(bias), residual=jnp.asarray(residual), **options)
    for weight, end in zip(weights, ends, strict=True):
        own = slice(end - weight.shape[0], end)
        padded = slice(own.start, own.start + -(-weight.shape[0] // 16) * 16)
        expected = call(x, weight, bias=jnp.asarray(bias[:, padded]), residual=jnp.asarray(residual[:, own]), **options)
        np.testing.assert_array_equal(found[:, own], expected)


@pytest.mark.parametrize("a", PACKED_FORMATS)
def test_unlike_parts_unite_exactly(a):
    rng = np.random.default_rng(5)
    for b in PACKED_FORMATS:
        united = common_format([a, b])
        assert common_format([b, a]) == united
        value = make(rng, a, 16, 256)
        converted, error = convert(value, united)
        assert error is None
        assert packed_format(converted) == united
        # What moves into an offset is exact; the sum with the product is rounded to float32 once, at another place.
        np.testing.assert_allclose(dense(converted), dense(value), rtol=0, atol=1e-6)


def test_wrong_shapes_are_refused(isa):
    weight = packed([make(np.random.default_rng(6), "q4", 64, 96)])
    cut = Weight(weight.data[:, :-64], weight.format, weight.shape)
    with pytest.raises(Exception, match=r"does not match its layout|wider"):
        call(np.zeros((2, 96), np.float32), cut)
