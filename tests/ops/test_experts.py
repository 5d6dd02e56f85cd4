"""Mixtures of experts: every ISA against the reference and against the linear layers they are made of, and against
itself for any number of rows and threads."""

import ctypes
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import make, packed

from strop.formats.values import dense
from strop.models.packing import pack, packed_bytes, packed_format
from strop.ops import native
from strop.ops.bound import bind_native
from strop.ops.dispatch import record
from strop.ops.experts import cost, experts
from strop.ops.linear import linear
from strop.ops.weights import Weight

D, F, E = 64, 32, 6
ROWS = (1, 2, 5, 16, 17, 40)
MOST = max(ROWS)


class Case:
    """Random experts of one format, as the kernels and as the reference take them; the first lies behind another."""

    def __init__(self, format_name: str, down_format: str | None = None, num_experts: int = E, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        down_format = down_format or format_name
        self.gate_up = [[make(rng, format_name, F, D) for _ in range(2)] for _ in range(1 + num_experts)]
        self.down = [[make(rng, down_format, D, F)] for _ in range(1 + num_experts)]
        self.x = rng.standard_normal((MOST, D)).astype(np.float32)
        self.scores = (2 * rng.standard_normal((MOST, num_experts))).astype(np.float32)
        self.scores[3] = self.scores[3, 0]  # all alike: the first are chosen
        self.residual = rng.standard_normal(self.x.shape).astype(np.float32)
        self.bias_in = rng.standard_normal((2, num_experts, 2 * F)).astype(np.float32)
        self.bias_out = rng.standard_normal((2, num_experts, D)).astype(np.float32)

    def stacks(self, platform: str) -> tuple[tuple[Weight, int], tuple[Weight, int]]:
        if platform == "native":
            return (stack(self.gate_up, interleave=True), 1), (stack(self.down), 1)
        into, out = (
            jnp.asarray(np.stack([np.concatenate([dense(part) for part in parts]) for parts in matrices]))
            for matrices in (self.gate_up, self.down)
        )
        return (Weight(into, "dense", into.shape[1:]), 1), (Weight(out, "dense", out.shape[1:]), 1)

    def biases(self, platform: str) -> tuple[jax.Array, jax.Array]:
        into = self.bias_in
        if platform == "native":
            into = into.reshape(2, -1, 2, F // 16, 16).swapaxes(2, 3).reshape(into.shape)
        return jnp.asarray(into), jnp.asarray(self.bias_out)

    def run(self, platform, num_rows=MOST, first=0, **options):
        rows = slice(first, first + num_rows)
        if options.pop("with_biases", False):
            options |= {"biases": self.biases(platform), "layer": 1}
        if options.pop("with_residual", False):
            options["residual"] = jnp.asarray(self.residual[rows])
        options = {"normalise": True, "activation": "silu"} | options
        num_active = options.pop("num_active", 2)
        counts = jnp.array([num_rows, 0], jnp.int32)
        x, scores = jnp.asarray(self.x[rows]), jnp.asarray(self.scores[rows])
        y = experts(x, scores, counts, *self.stacks(platform), num_active, platform=platform, **options)
        return np.asarray(y)


def stack(matrices, interleave=False):
    singles = [packed(parts, interleave) for parts in matrices]
    return Weight(jnp.concatenate([one.data for one in singles]), singles[0].format, singles[0].shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalise": False},
        {"num_active": 1, "normalise": False},
        {"num_active": E, "with_residual": True, "scale": 0.5},
        {"with_residual": True, "activation": "gelu"},
        {"with_biases": True, "activation": "gelu_sigmoid", "gate_limit": 0.3},
        {"with_biases": True, "activation": "relu", "scale": 2.0},
    ],
    ids=str,
)
def test_floats_agree_with_the_reference(isa, options):
    case = Case("f32")
    wanted = case.run("xla", **options)
    np.testing.assert_allclose(case.run("native", **options), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_more_experts_than_lanes(isa):
    case = Case("f32", num_experts=37)
    for options in ({"num_active": 20}, {"num_active": 3, "normalise": False}):
        wanted = case.run("xla", **options)
        np.testing.assert_allclose(case.run("native", **options), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("format_name", "down_format"), [("q4", "q8"), ("q4_offset", "q8_offset"), ("bf16", "f16")])
def test_packed_experts_are_their_linear_layers(isa, format_name, down_format):
    case = Case(format_name, down_format)
    counts = jnp.array([len(case.x), 0], jnp.int32)
    wanted = case.residual.copy()
    best = np.argsort(-case.scores, axis=1, kind="stable")[:, :2]
    shares = np.exp(np.take_along_axis(case.scores, best, axis=1).astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    for e in range(E):
        into, out = packed(case.gate_up[1 + e], interleave=True), packed(case.down[1 + e])
        activated = linear(jnp.asarray(case.x), into, 0, counts, platform="native", activation="silu", gated=True)
        given = np.asarray(linear(activated, out, 0, counts, platform="native"))
        wanted += given * np.where(best == e, shares, 0).sum(axis=1, keepdims=True).astype(np.float32)
    found = case.run("native", with_residual=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("format_name", ["q4", "bf16"])
def test_a_row_is_the_same_in_any_company(isa, format_name):
    case = Case(format_name)
    options = {"with_residual": True, "with_biases": True}
    whole = case.run("native", **options)
    for num_rows in ROWS:
        for first in range(0, len(whole) - num_rows + 1, 7):
            found = case.run("native", num_rows, first, **options)
            np.testing.assert_array_equal(found, whole[first : first + num_rows])


def test_threads_do_not_change_a_bit(isa):
    case = Case("q4_offset", "q8")
    native.set_num_threads(1)
    alone = case.run("native", with_residual=True)
    native.set_num_threads(3)
    try:
        np.testing.assert_array_equal(case.run("native", with_residual=True), alone)
    finally:
        native.set_num_threads(1)


def test_scores_that_are_no_numbers_spoil_no_other_row(isa):
    case = Case("q4")
    good = case.run("native")
    case.scores[1], case.scores[2], case.scores[4] = np.nan, -np.inf, np.inf
    case.scores[5, 2:] = np.nan
    found = case.run("native")
    others = [row for row in range(len(good)) if row not in (1, 2, 4, 5)]
    np.testing.assert_array_equal(found[others], good[others])


def test_wrong_shapes_are_refused(isa):
    case = Case("q4")
    (gate_up, first), down = case.stacks("native")
    x, scores, counts = jnp.asarray(case.x), jnp.asarray(case.scores), jnp.array([len(case.x), 0], jnp.int32)

    def call(gate_up, first, scores=scores, counts=counts, num_active=2):
        options = {"normalise": True, "activation": "silu", "platform": "native"}
        return np.asarray(experts(x, scores, counts, (gate_up, first), down, num_active, **options))

    call(gate_up, first)
    with pytest.raises(Exception, match="gate and up does not match"):
        call(gate_up, first + 1)
    with pytest.raises(Exception, match="must alternate"):
        call(Weight(gate_up.data[:, :-64], gate_up.format, gate_up.shape), first)
    with pytest.raises(Exception, match="bad row count"):
        call(gate_up, first, counts=counts + 1)
    with pytest.raises(Exception, match="bad attributes"):
        call(gate_up, first, num_active=E + 1)
    with pytest.raises(Exception, match=r"shapes \[T, D\], \[T, E\]"):
        call(gate_up, first, scores[1:])


def resident(array: np.ndarray) -> bool:
    """Whether any page of the array has been touched."""
    pages = (ctypes.c_ubyte * -(-array.nbytes // mmap.PAGESIZE))()
    address, length = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    assert ctypes.CDLL(None, use_errno=True).mincore(address, length, pages) == 0
    return any(page & 1 for page in pages)


def test_experts_that_no_row_chose_are_not_touched(isa):
    case = Case("f32")
    chosen, weights = (1, 4), []
    for matrices, interleave in ((case.gate_up, True), (case.down, False)):
        parts = matrices[0]
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        num_bytes = packed_bytes(packed_format(parts[0]), *shape)
        assert num_bytes % mmap.PAGESIZE == 0
        fresh = np.frombuffer(mmap.mmap(-1, E * num_bytes), np.uint8).reshape(E, num_bytes)
        for e in chosen:
            pack(matrices[1 + e], packed_format(parts[0]), fresh[e], interleave=interleave)
        weights.append(Weight(fresh, packed_format(parts[0]), shape))
    scores = np.full((1, E), -1, np.float32)
    scores[:, chosen] = 2, 1
    counts = np.array([1, 0], np.int32)

    def step(kept, x, scores, counts):
        gate_up, down = kept
        options = {"normalise": True, "activation": "silu", "platform": "native"}
        return (experts(x, scores, counts, (gate_up, 0), (down, 0), 2, **options),)

    bound = bind_native(native.library(), step, weights, case.x[:1], scores, counts)
    (found,) = bound(case.x[:1], scores, counts)
    case.scores[:1] = scores
    np.testing.assert_array_equal(found, case.run("native", 1))
    for weight in weights:
        assert [e for e in range(E) if resident(weight.data[e])] == list(chosen)


def test_the_cost_is_that_of_the_active_experts(isa):
    case = Case("q4", "q8")
    with record() as calls:
        case.run("native", 3)
    (call,) = calls
    expert_bytes = packed_bytes("q4", 2 * F, D) + packed_bytes("q8", D, F)
    assert call.expert_bytes == expert_bytes
    least, all_read = cost.cost(call), cost.cost(call, num_chosen=E)
    assert (least.kind, least.flops, least.bytes_written) == ("int8", 2 * 3 * 2 * (3 * F * D), 0)
    assert (least.bytes_read, all_read.bytes_read) == (2 * expert_bytes, E * expert_bytes)
