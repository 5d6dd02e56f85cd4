"""Strung operations give the very bits the single ones give, wherever XLA's own operations lie between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import make, packed

from strop.ops import native
from strop.ops.attention import Rows, attention
from strop.ops.linear import Norm, linear
from strop.ops.program import string_calls

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs the native library")

K, HEADS, HEAD_DIM, ROWS = 64, 2, 32, 8


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    assert native.register()
    return {
        "qkv": packed([make(rng, "q4", 3 * K, K)]),
        "o": packed([make(rng, "q8", K, K)]),
        "norm": jnp.asarray(rng.random((2, K)), jnp.float32),
        "x": jnp.asarray(rng.standard_normal((ROWS, K)), jnp.float32),
    }


def rows():
    places = jnp.arange(ROWS, dtype=jnp.int32)
    fields = jnp.stack([places, places, places, 0 * places, places + 1, 0 * places])
    return Rows(fields, jnp.asarray([[1]], jnp.int32), jnp.asarray([ROWS, ROWS], jnp.int32))


def cache():
    return jnp.zeros((2, 3, HEADS, 2, 32 * HEAD_DIM), jnp.bfloat16)


def step(model, between):
    """Two layers; `between` lies on the way from one to the other."""

    def run(x, cache):
        r = rows()
        for layer in range(2):
            norm = Norm(model["norm"], 1e-5)
            qkv = linear(x, model["qkv"], 0, r.counts, platform="native", layer=layer, norm=norm)
            attended, cache = attention(
                qkv, cache, layer, r, None, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, scale=0.2,
                block_len=32, platform="native",
            )  # fmt: skip
            x = between(linear(attended, model["o"], 0, r.counts, platform="native", residual=x))
        last = jnp.asarray([ROWS - 1], jnp.int32)
        return linear(x, model["o"], 0, jnp.asarray([1]), platform="native", row_ids=last), x, cache

    return run


@pytest.mark.parametrize("between", [lambda x: x, lambda x: 2.0 * x, jnp.tanh], ids=["nothing", "xla", "xla-call"])
def test_strung_equals_single(model, between):
    single = jax.jit(step(model, between), donate_argnums=1)(model["x"], cache())
    strung = jax.jit(string_calls(step(model, between)), donate_argnums=1)(model["x"], cache())
    for name, a, b in zip(("picked", "x", "cache"), single, strung, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_one_program_where_nothing_lies_between(model):
    def programs(function):
        text = jax.jit(function, donate_argnums=1).lower(model["x"], cache()).as_text()
        return text.count("@strop_program")

    assert programs(step(model, lambda x: x)) == 7
    assert programs(string_calls(step(model, lambda x: x))) == 1
    assert programs(string_calls(step(model, jnp.tanh))) == 3


def test_the_cache_must_be_donated(model):
    run = jax.jit(string_calls(step(model, lambda x: x)))
    kept = cache()
    before = np.asarray(kept).copy()
    run(model["x"], kept)  # without donation XLA copies: the caller's array stays as it was
    assert np.array_equal(before.view(np.uint16), np.asarray(kept).view(np.uint16))


def test_a_row_id_out_of_range_is_refused(model):
    def pick(x, ids):
        return linear(x, model["o"], 0, jnp.asarray([1]), platform="native", row_ids=ids)

    with pytest.raises(Exception, match="a row id is out of range"):
        np.asarray(jax.jit(pick)(model["x"], jnp.asarray([ROWS], jnp.int32)))
