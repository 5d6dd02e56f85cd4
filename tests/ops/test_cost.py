"""Costs against XLA's own count of the reference operations, and against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from strop.ops.attention import AttentionCall
from strop.ops.attention import cost as attention_cost
from strop.ops.dispatch import record
from strop.ops.embed import EmbedCall
from strop.ops.embed import cost as embed_cost
from strop.ops.experts import cost as experts_cost
from strop.ops.experts import experts
from strop.ops.linear import LinearCall, linear
from strop.ops.linear import cost as linear_cost
from strop.ops.weights import Weight


@pytest.mark.parametrize(("num_rows", "n_len", "k_len"), [(1, 64, 32), (7, 96, 160)])
def test_linear_flops_are_xlas(num_rows, n_len, k_len):
    def product(x, data):
        return linear(x, Weight(data, "dense", (n_len, k_len)), 0, jnp.array([num_rows], jnp.int32), platform="xla")

    shapes = jax.ShapeDtypeStruct((num_rows, k_len), jnp.float32), jax.ShapeDtypeStruct((1, n_len, k_len), jnp.float32)
    with record() as calls:
        analysis = jax.jit(product).lower(*shapes).compile().cost_analysis()
    cost = linear_cost.cost(calls[0])
    assert cost.flops == pytest.approx(analysis["flops"], rel=0.05)
    assert (cost.kind, cost.bytes_read) == ("f32", 4 * n_len * k_len)


def test_a_packed_linear_counts_its_stored_bytes():
    cost = linear_cost.cost(LinearCall(3, 64, 32, "q4_offset", 1280))
    assert (cost.kind, cost.flops, cost.bytes_read, cost.bytes_written) == ("int8", 2 * 3 * 64 * 32, 1280, 0)


def test_attention_counts_what_rows_see_and_what_sequences_hold():
    call = AttentionCall(2, 8, 2, 16, 16, 32, 0.25)
    cost = attention_cost.cost(call, visible_slots=30, read_slots=20)
    slot_bytes = 2 * 2 * 16 * 2
    assert cost.flops == 2 * (2 * 8 * 16 * 30)
    assert (cost.bytes_read, cost.bytes_written) == (20 * slot_bytes, 2 * slot_bytes)


@pytest.mark.parametrize(("num_rows", "num_chosen", "num_read"), [(1, None, 2), (3, None, 2), (3, 4, 4)])
def test_experts_read_those_that_rows_choose(num_rows, num_chosen, num_read):
    gate_up, down = (Weight(jnp.zeros((4, *shape)), "dense", shape) for shape in ((96, 32), (32, 48)))
    x, scores = jnp.zeros((num_rows, 32)), jnp.zeros((num_rows, 4))
    with record() as calls:
        experts(x, scores, None, (gate_up, 0), (down, 0), 2, normalise=True, activation="silu", platform="xla")
    cost = experts_cost.cost(calls[0], num_chosen)
    assert (cost.kind, cost.bytes_read) == ("f32", num_read * 4 * 3 * 48 * 32)
    assert cost.flops == 2 * num_rows * 2 * 3 * 48 * 32


def test_experts_flops_are_xlas():
    """Of one expert: XLA counts a loop's body once."""

    def mixture(x, scores, gate_up, down):
        stacks = (Weight(gate_up, "dense", (96, 32)), 0), (Weight(down, "dense", (32, 48)), 0)
        return experts(x, scores, None, *stacks, 1, normalise=True, activation="silu", platform="xla")

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((7, 32), (7, 1), (1, 96, 32), (1, 32, 48))]
    with record() as calls:
        analysis = jax.jit(mixture).lower(*shapes).compile().cost_analysis()
    assert experts_cost.cost(calls[0]).flops == pytest.approx(analysis["flops"], rel=0.1)


def test_an_embedding_reads_one_row_per_token():
    dense, packed = (embed_cost.cost(EmbedCall(5, 64, format)) for format in ("dense", "q8"))
    assert (dense.flops, dense.bytes_read) == (0, 5 * 64 * 4)
    assert packed.bytes_read == 5 * (64 + 2 * 2)
