"""Strung operations give the very bits the single ones give, wherever XLA's own operations lie between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import make, packed

from strop.ops import native
from strop.ops.attention import AttentionOperands, Rows, attention
from strop.ops.bound import bind_native
from strop.ops.linear import linear
from strop.ops.norm import Norm
from strop.ops.program import string_calls
from strop.ops.weights import SplitWeight

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
            norm = Norm("rms", model["norm"], None, 1e-5, layer)
            qkv = linear(x, model["qkv"], 0, r.counts, platform="native", layer=layer, norm=norm)
            attended, cache = attention(
                qkv, cache, layer, r, AttentionOperands(), num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM,
                scale=0.2, block_len=32, platform="native",
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


def test_bound_equals_single(model):
    def run(kept, x, cache):
        return step(model | {"norm": kept[0]}, lambda x: x)(x, cache)

    single = jax.jit(step(model, lambda x: x), donate_argnums=1)(model["x"], cache())
    bound = bind_native(native.library(), run, [model["norm"]], model["x"], cache())
    assert bound is None  # the weights and the rows are constants of `run`, not parts of its arguments

    def whole(kept, ints, x, cache):
        norm, qkv, o = kept
        fields, tables, counts, last = ints[:48].reshape(6, 8), ints[48:49].reshape(1, 1), ints[49:51], ints[51:52]
        for layer in range(2):
            y = linear(x, qkv, 0, counts, platform="native", layer=layer, norm=Norm("rms", norm, None, 1e-5, layer))
            y, cache = attention(
                y, cache, layer, Rows(fields, tables, counts), AttentionOperands(), num_heads=HEADS, num_kv_heads=HEADS,
                head_dim=HEAD_DIM, scale=0.2, block_len=32, platform="native",
            )  # fmt: skip
            x = linear(y, o, 0, counts, platform="native", residual=x)
        return linear(x, o, 0, ints[51:53], platform="native", row_ids=last, count_index=1), x, cache

    r = rows()
    ints = np.concatenate([np.ravel(r.fields), [1], [ROWS, ROWS], [ROWS - 1, 1]]).astype(np.int32)
    kept = [model["norm"], model["qkv"], model["o"]]
    bound = bind_native(native.library(), whole, kept, ints, model["x"], cache())
    for _ in range(2):  # the second time nothing is decoded again
        given = cache()
        picked, x, written = bound(ints, model["x"], given)
        assert written is given
        for name, a, b in zip(("picked", "x", "cache"), single, (picked, x, written), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_bound_writes_several_caches(model):
    """Each layer with a cache and a block table of its own, as windowed layers have."""

    def whole(kept, ints, x, *caches):
        fields, tables, counts = ints[:48].reshape(6, 8), ints[48:50].reshape(2, 1, 1), ints[50:52]
        written = []
        for layer in range(2):
            y = linear(
                x, kept[1], 0, counts, platform="native", layer=layer, norm=Norm("rms", kept[0], None, 1e-5, layer)
            )
            y, cache = attention(
                y, caches[layer], 0, Rows(fields, tables[layer], counts), AttentionOperands(), num_heads=HEADS,
                num_kv_heads=HEADS, head_dim=HEAD_DIM, scale=0.2, block_len=32, platform="native",
            )  # fmt: skip
            written.append(cache)
            x = linear(y, kept[2], 0, counts, platform="native", residual=x)
        return x, *written

    _, x, single = jax.jit(step(model, lambda x: x), donate_argnums=1)(model["x"], cache())
    ints = np.concatenate([np.ravel(rows().fields), [1, 2], [ROWS, ROWS]]).astype(np.int32)
    caches = [jnp.zeros((1, num_blocks, *cache().shape[2:]), jnp.bfloat16) for num_blocks in (2, 3)]
    kept = [model["norm"], model["qkv"], model["o"]]
    bound = bind_native(native.library(), whole, kept, ints, model["x"], *caches)
    for _ in range(2):
        got, *written = bound(ints, model["x"], *caches)
        assert [a is b for a, b in zip(written, caches, strict=True)] == [True, True]
        assert np.asarray(got).tobytes() == np.asarray(x).tobytes()
        for layer, block in ((0, 1), (1, 2)):
            mine, other = np.asarray(caches[layer])[0, block], np.asarray(single)[layer, 1]
            assert mine.tobytes() == other.tobytes()


def test_a_split_weight_is_one_program(model):
    rng = np.random.default_rng(1)
    split = SplitWeight((packed([make(rng, "q4", 2 * K, K)]), packed([make(rng, "q8", K, K)])))

    def run(kept, x, counts):
        return (linear(linear(x, kept[0], 0, counts, platform="native"), kept[1], 0, counts, platform="native"),)

    out = packed([make(rng, "f32", K, 3 * K)])
    counts = np.array([ROWS, 0], np.int32)
    single = jax.jit(run)([split, out], model["x"], counts)[0]
    bound = bind_native(native.library(), run, [split, out], model["x"], counts)
    assert np.array_equal(bound(model["x"], counts)[0], single)


def test_bound_refuses_and_recovers(model):
    def pick(kept, x, ids):
        return (linear(x, kept[0], 0, ids[1:], platform="native", row_ids=ids[:1]),)

    ids = np.array([0, 1], np.int32)
    bound = bind_native(native.library(), pick, [model["o"]], model["x"], ids)
    good = bound(model["x"], ids)[0].copy()
    for wrong, message in (([ROWS, 1], "a row id is out of range"), ([-1, 1], "a row id"), ([0, 2], "bad row count")):
        ids[:] = wrong
        with pytest.raises(RuntimeError, match=message):
            bound(model["x"], ids)
    ids[:] = 0, 1
    assert np.array_equal(bound(model["x"], ids)[0], good)
    deleted = jnp.array(model["x"])
    deleted.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        bound(deleted, ids)


def test_bound_declines_what_is_not_plain(model):
    def pick(kept, x, ids):
        return (linear(x, kept[0], 0, ids[1:], platform="native", row_ids=ids[:1]),)

    for ids in (np.array([0, 1]), np.array([0, 9, 1, 9], np.int32)[::2]):  # int64, strided
        assert bind_native(native.library(), pick, [model["o"]], model["x"], ids) is None

    def doubled(kept, x, ids):
        return pick(kept, 2.0 * x, ids)

    assert bind_native(native.library(), doubled, [model["o"]], model["x"], np.array([0, 1], np.int32)) is None
