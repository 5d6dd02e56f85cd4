"""Attention: every ISA against the reference over the same tokens, and against itself for any packing of rows."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strop.ops import native
from strop.ops.attention import AttentionOperands, Rows, attention, new_cache
from strop.ops.norm import Norm

BLOCK_LEN = 32


def make_rows(spans, tables, window=None):
    """spans: (sequence, start, count) in order."""
    columns = []
    for seq, start, count in spans:
        for slot in range(start, start + count):
            lo = 0 if window is None else max(0, slot + 1 - window)
            columns.append((0, slot, slot, lo, slot + 1, seq))
    fields = np.zeros((6, padded_len(len(columns))), np.int32)
    fields[:, : len(columns)] = np.array(columns, np.int32).T
    return Rows(jnp.asarray(fields), jnp.asarray(tables, jnp.int32), jnp.array([len(columns), 0], jnp.int32))


def padded_len(num_rows):
    """A power of two, so that few shapes are compiled."""
    return 1 << (num_rows - 1).bit_length()


NORM_SHAPES = {
    "head": lambda num_heads, head_dim: (head_dim,),
    "each_head": lambda num_heads, head_dim: (num_heads, head_dim),
    "all_heads": lambda num_heads, head_dim: (num_heads * head_dim,),
}


class Case:
    def __init__(
        self,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        lengths=(5, 40, 97),
        rotary_dim=None,
        window=None,
        qk_norm=None,
        sinks=False,
        scale=0.125,
        **options,
    ):
        self.heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.heads |= {"scale": scale, "block_len": BLOCK_LEN, **options}
        self.cache_options = {
            key: self.heads[key] for key in ("num_kv_heads", "head_dim", "block_len", "kv_dtype") if key in self.heads
        }
        self.lengths, self.window = lengths, window
        rng = np.random.default_rng(7)
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv = [rng.standard_normal((length, width)).astype(np.float32) for length in lengths]
        blocks = rng.permutation(np.arange(1, 1 + 18 * len(lengths))).reshape(len(lengths), 18)
        self.tables = blocks
        self.num_blocks = 1 + blocks.size
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        angles = rng.standard_normal((576, rotary_dim // 2))
        rope = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
        norms = None
        if qk_norm is not None:
            kind, over, bias = qk_norm
            norms = tuple(
                Norm(kind, *vectors(rng, NORM_SHAPES[over](heads, head_dim), bias), 1e-5, row=2)
                for heads in (num_heads, num_kv_heads)
            )
        stack = jnp.asarray(4 * rng.standard_normal((3, num_heads)), jnp.float32)
        self.operands = AttentionOperands(rope if rotary_dim else None, norms, (stack, 2) if sinks else None)

        def step(qkv, cache, rows, platform):
            return attention(qkv, cache, 1, rows, self.operands, **self.heads, platform=platform)

        self.step = jax.jit(step, donate_argnums=1, static_argnums=3)

    def run(self, platform, steps):
        """Each step is a list of (sequence, start, count); returns every row's output by (sequence, slot)."""
        cache = new_cache(platform, 2, self.num_blocks, **self.cache_options)
        out = {}
        for spans in steps:
            rows = make_rows(spans, self.tables, self.window)
            qkv = np.full((rows.fields.shape[1], self.qkv[0].shape[1]), np.nan, np.float32)
            given = np.concatenate([self.qkv[seq][start : start + count] for seq, start, count in spans])
            qkv[: len(given)] = given
            y, cache = self.step(jnp.asarray(qkv), cache, rows, platform)
            places = [(seq, slot) for seq, start, count in spans for slot in range(start, start + count)]
            out.update(zip(places, np.asarray(y)[: len(given)], strict=True))
        return np.stack([out[seq, slot] for seq, length in enumerate(self.lengths) for slot in range(length)])


def vectors(rng, shape, bias):
    """The weights of a norm, and its bias or None: [3, *shape]."""
    made = [jnp.asarray(1 + 0.3 * rng.standard_normal((3, *shape)), jnp.float32) for _ in range(2)]
    return made if bias else (made[0], None)


def padded(qkv):
    """With as many rows as `make_rows` gives."""
    return jnp.pad(jnp.asarray(qkv), ((0, padded_len(len(qkv)) - len(qkv)), (0, 0)))


def whole(case):
    return [[(seq, 0, length) for seq, length in enumerate(case.lengths)]]


def one_by_one(case):
    """The last tokens of each sequence, as they are generated."""
    firsts = [max(0, length - 40) for length in case.lengths]
    together = [(seq, 0, first) for seq, first in enumerate(firsts) if first]
    return [together] * bool(together) + [
        [
            (seq, first + i, 1)
            for seq, (first, length) in enumerate(zip(firsts, case.lengths, strict=True))
            if first + i < length
        ]
        for i in range(40)
    ]


def ragged(case):
    rng = np.random.default_rng(8)
    done, steps = [0] * len(case.lengths), []
    while any(d < length for d, length in zip(done, case.lengths, strict=True)):
        spans = []
        for seq, length in enumerate(case.lengths):
            count = min(int(rng.integers(0, 23 + length // 4)), length - done[seq])
            if count:
                spans.append((seq, done[seq], count))
                done[seq] += count
        if spans:
            steps.append(spans)
    return steps


CASES = {
    "grouped": {},
    "multihead": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32},
    "multiquery": {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16},
    "wide_heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 80},
    "part_rotary": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "rotary_dim": 32},
    "window": {"window": 13},
    "many_spans": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "lengths": (40, 530)},
    "window_over_spans": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "lengths": (530,), "window": 300},
    "window_len": {"window_len": 13},
    "window_len_over_spans": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "lengths": (530,), "window_len": 300},
    "heads_96": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 96},
    "heads_112": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 112},
    "heads_128": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128},
    "heads_256": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "scale": 0.0625},
    "norm_of_heads": {"qk_norm": ("rms", "head", False)},
    "norm_over_heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 48, "qk_norm": ("rms", "all_heads", False)},
    "layer_norm_of_heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "qk_norm": ("layer", "head", True)},
    "layer_norm_of_each_head": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "qk_norm": ("layer", "each_head", True),
    },
    "layer_norm_over_heads": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "qk_norm": ("layer", "all_heads", False),
    },
    "soft_cap": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "scale": 0.7, "soft_cap": 2.0},
    "sinks": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "sinks": True},
    "sinks_over_spans": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "sinks": True, "lengths": (40, 530)},
    "alibi": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "rotary_dim": 0, "alibi_scale": 1.0},
    "scaled_alibi": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "rotary_dim": 0, "alibi_scale": 0.125},
    "int8": {"kv_dtype": "int8"},
    "int8_multiquery": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 80, "kv_dtype": "int8"},
    "int8_over_spans": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "kv_dtype": "int8", "lengths": (40, 530)},
    "int8_window": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 48, "kv_dtype": "int8", "window_len": 13},
    "all_at_once": {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 48,
        "rotary_dim": 32,
        "lengths": (7, 300),
        "window_len": 270,
        "qk_norm": ("layer", "head", True),
        "scale": 0.4,
        "soft_cap": 3.0,
        "sinks": True,
        "alibi_scale": 0.5,
    },
}


@cache
def case_of(name):
    return Case(**CASES[name])


@cache
def expected(name):
    return case_of(name).run("xla", whole(case_of(name)))


@pytest.mark.parametrize("name", list(CASES))
def test_kernel_agrees_with_the_reference(name, isa):
    case = case_of(name)
    # bf16 keys, values and probabilities against float32
    np.testing.assert_allclose(case.run("native", ragged(case)), expected(name), atol=3e-2, rtol=0)


@pytest.mark.parametrize("name", list(CASES))
def test_packing_and_threads_do_not_change_a_bit(name, isa):
    case = case_of(name)
    native.set_num_threads(1)
    together = case.run("native", whole(case))
    for steps in (one_by_one(case), ragged(case)):
        np.testing.assert_array_equal(case.run("native", steps), together)
    native.set_num_threads(3)
    try:
        np.testing.assert_array_equal(case.run("native", ragged(case)), together)
    finally:
        native.set_num_threads(1)


def test_reference_is_the_same_with_and_without_the_cache():
    case = Case(lengths=(32,))  # no padding: without a cache it would be seen
    rows = make_rows([(0, 0, 32)], case.tables)
    plain, _ = attention(
        jnp.asarray(case.qkv[0]),
        None,
        0,
        rows,
        case.operands,
        **case.heads,
        platform="xla",
    )
    np.testing.assert_allclose(case.run("xla", ragged(case)), np.asarray(plain), atol=2e-6, rtol=0)


def test_cache_is_updated_in_place(isa):
    case = Case(lengths=(33,))
    cache = new_cache("native", 1, case.num_blocks, 3, 64, BLOCK_LEN)
    rows = make_rows([(0, 0, 33)], case.tables)

    def step(qkv, cache, rows):
        y, cache = attention(qkv, cache, 0, rows, case.operands, **case.heads, platform="native")
        return y, cache

    compiled = jax.jit(step, donate_argnums=1).lower(padded(case.qkv[0]), cache, rows).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    pointer = cache.unsafe_buffer_pointer()
    _, cache = compiled(padded(case.qkv[0]), cache, rows)
    assert cache.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_stale_pages_never_leak(isa, kv_dtype):
    """Slots past a row's end may hold anything, NaN included."""
    case = Case(lengths=(5,), kv_dtype=kv_dtype)
    empty = new_cache("native", 2, case.num_blocks, **case.cache_options)
    cache = jnp.full_like(empty, 255 if kv_dtype == "int8" else jnp.nan)  # the scale of bytes 255 is NaN
    rows = make_rows([(0, 0, 5)], case.tables)
    y, _ = attention(padded(case.qkv[0]), cache, 0, rows, case.operands, **case.heads, platform="native")
    assert np.isfinite(np.asarray(y)[:5]).all()


def test_rows_outside_the_cache_are_refused(isa):
    case = Case(lengths=(5,))
    for field, value in ((2, 999), (4, 999), (5, 7), (1, 600)):
        rows = make_rows([(0, 0, 5)], case.tables)
        rows = rows._replace(fields=rows.fields.at[field, 2].set(value))
        cache = new_cache("native", 1, case.num_blocks, 3, 64, BLOCK_LEN)
        with pytest.raises(Exception, match="outside the cache"):
            jax.block_until_ready(
                attention(padded(case.qkv[0]), cache, 0, rows, case.operands, **case.heads, platform="native")
            )
