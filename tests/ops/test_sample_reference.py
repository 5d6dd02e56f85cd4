import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from strop.ops.sample import SampleInputs, SampleOutputs, reference

F32_MAX = float(np.finfo(np.float32).max)

sample: Callable[..., SampleOutputs] = jax.jit(reference.sample, static_argnames=("num_top",))
greedy = jax.jit(reference.greedy)


def make_inputs(
    num_rows: int,
    *,
    temperature=1.0,
    top_p=1.0,
    min_p=0.0,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    top_k=0,
    seed=1,
    position=0,
    edits=(),
) -> SampleInputs:
    """Each value for all rows, or one per row. edits: (row, token, count, seen, bias)."""
    floats = np.empty((num_rows, 6), np.float32)
    for column, value in enumerate((temperature, top_p, min_p, repetition, presence, frequency)):
        floats[:, column] = value
    ints = np.empty((num_rows, 4), np.uint32)
    seed = np.asarray(seed, np.uint64)
    for column, value in enumerate((top_k, seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32), position)):
        ints[:, column] = value
    edits = [*sorted(edits), (-1, 0, 0, 0, 0.0), (-1, 0, 0, 0, 0.0)]
    row, token, count, seen, bias = (np.array(column) for column in zip(*edits, strict=True))
    return SampleInputs(floats, ints, *(a.astype(np.int32) for a in (row, token, count, seen)), bias.astype(np.float32))


def draws(logits: np.ndarray, num_draws: int, **params) -> np.ndarray:
    """Token ids of `num_draws` positions of one row of logits."""
    inputs = make_inputs(num_draws, position=np.arange(num_draws), **params)
    return np.asarray(sample(np.broadcast_to(logits, (num_draws, len(logits))), inputs, num_top=0).token_ids)


def expected_distribution(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The definition, token by token, in float64."""
    z = logits.astype(np.float64) / temperature
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if top_k:
        order = order[:top_k]
    p = np.exp(z - z.max())
    mass = sum(p[i] for i in order)
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= top_p * mass:
            break
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    out = np.zeros(len(z))
    out[kept] = p[kept]
    return out / out.sum()


def chi_square_limit(degrees: int) -> float:
    """About the 99.99 % point (Wilson & Hilferty 1931)."""
    t = 2 / (9 * degrees)
    return degrees * (1 - t + 3.72 * math.sqrt(t)) ** 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.6},
        {"top_p": 0.95, "temperature": 1.5},
        {"top_k": 8, "top_p": 0.8},
        {"min_p": 0.2},
        {"top_p": 0.9, "min_p": 0.3, "top_k": 10, "temperature": 1.3},
    ],
)
@pytest.mark.parametrize("seed", [3, 2**63 + 12345])
def test_draws_follow_the_distribution(params: dict, seed: int) -> None:
    logits = (np.random.default_rng(0).standard_normal(24) * 1.5).astype(np.float32)
    num_draws = 20_000
    counts = np.bincount(draws(logits, num_draws, seed=seed, **params), minlength=len(logits))
    expected = expected_distribution(logits, **params) * num_draws
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    chi_square = np.sum((observed - wanted) ** 2 / np.maximum(wanted, 1e-9), where=wanted > 0)
    assert chi_square < chi_square_limit(max(1, len(observed) - 1))


def test_many_seeds_at_one_position_follow_the_distribution() -> None:
    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.125]))
    num_draws = 20_000
    inputs = make_inputs(num_draws, seed=np.arange(num_draws), position=5)
    ids = np.asarray(sample(np.broadcast_to(logits, (num_draws, 4)), inputs, num_top=0).token_ids)
    expected = np.exp(logits.astype(np.float64)) * num_draws
    assert np.sum((np.bincount(ids, minlength=4) - expected) ** 2 / expected) < chi_square_limit(3)


def test_improbable_tokens_keep_their_share() -> None:
    probability, num_rare, num_draws = 1.2e-6, 2000, 20_000
    logits = np.full(num_rare + 1, math.log(probability), np.float32)
    logits[7] = math.log(1 - num_rare * probability)
    pieces = [draws(logits, num_draws // 10, seed=seed) for seed in range(10)]  # for the memory's sake
    expected = num_rare * probability * num_draws
    assert abs(np.sum(np.concatenate(pieces) != 7) - expected) < 5 * math.sqrt(expected)


def test_noise_is_a_gumbel_variable_independent_across_positions_and_tokens() -> None:
    num_positions, vocab_size = 64, 4096
    ints = make_inputs(num_positions, position=np.arange(num_positions), seed=9).ints
    noise = np.asarray(reference.gumbel(ints, vocab_size), np.float64)
    count = noise.size
    assert np.all(np.isfinite(noise))
    assert abs(noise.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    uniform = np.sort(np.exp(-np.exp(-noise)).ravel())  # Kolmogorov-Smirnov
    assert np.max(np.abs(uniform - (np.arange(count) + 0.5) / count)) < 2.2 / math.sqrt(count)
    for lag in (noise[1:] * noise[:-1], noise[:, 1:] * noise[:, :-1], noise[2:] * noise[:-2]):
        assert abs(lag.mean() - np.euler_gamma**2) < 6 * 2.2 / math.sqrt(lag.size)


def test_the_generator_never_changes() -> None:
    """A seed's answer should outlive a release. The values were computed in exact integers and float64."""
    ints = make_inputs(2, seed=np.uint64(0x0123456789ABCDEF), position=[0, 77]).ints
    expected = [[-0.375478, -1.0948478, 0.7030404, -0.0415536], [-0.0473269, 1.6706201, -0.6796686, 0.606687]]
    np.testing.assert_allclose(reference.gumbel(ints, 4), expected, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(1)
    num_rows, vocab_size = 9, 300
    logits = (rng.standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)
    inputs = make_inputs(
        num_rows,
        temperature=[0, 0.7, 1, 1, 1.3, 0.9, 1, 1, 2],
        top_p=[1, 1, 0.9, 1, 0.5, 1, 0.8, 1, 1],
        top_k=[0, 0, 0, 7, 20, 0, 0, 1, 0],
        min_p=[0, 0.1, 0, 0, 0, 0, 0, 0, 0],
        repetition=1.2,
        seed=rng.integers(0, 2**63, num_rows),
        position=rng.integers(0, 100, num_rows),
        edits=[(row, int(token), 1, 1, 0.0) for row in range(num_rows) for token in rng.permutation(vocab_size)[:10]],
    )
    together = sample(logits, inputs, num_top=3)
    for order in (rng.permutation(num_rows), np.array([4])):
        rows = order.tolist()
        edits = [
            (rows.index(r), int(t), int(c), int(s), float(b))
            for r, t, c, s, b in zip(*inputs[2:7], strict=True)
            if r in rows
        ]
        alone = make_inputs(len(rows), edits=edits)._replace(floats=inputs.floats[order], ints=inputs.ints[order])
        result = sample(logits[order], alone, num_top=3)
        np.testing.assert_array_equal(result.token_ids, np.asarray(together.token_ids)[order])
        np.testing.assert_array_equal(result.top_ids, np.asarray(together.top_ids)[order])


def test_penalties_and_bias_equal_their_definition() -> None:
    rng = np.random.default_rng(2)
    num_rows, vocab_size = 40, 60
    logits = (rng.standard_normal((num_rows, vocab_size)) * 2).astype(np.float32)
    repetition = rng.uniform(0.5, 2, num_rows).astype(np.float32)
    presence, frequency = rng.uniform(-1, 1, (2, num_rows)).astype(np.float32)
    edits = []
    edited = logits.astype(np.float64)
    for row in range(num_rows):
        for token in rng.permutation(vocab_size)[:30]:
            count = int(rng.integers(0, 4))
            seen = int(count > 0 or rng.random() < 0.5)
            bias = float(rng.choice([0.0, 0.0, 1.5, -np.inf]))
            edits.append((row, int(token), count, seen, bias))
            value = edited[row, token]
            if seen:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            if count:
                value -= presence[row] + count * frequency[row]
            edited[row, token] = value + bias
    inputs = make_inputs(
        num_rows, temperature=0, repetition=repetition, presence=presence, frequency=frequency, edits=edits
    )
    result = sample(logits, inputs, num_top=1)
    np.testing.assert_array_equal(result.token_ids, edited.argmax(axis=1))
    assert np.any(edited.argmax(axis=1) != logits.argmax(axis=1))
    # The log probabilities are still those of the raw logits.
    raw = logits.astype(np.float64)
    lse = np.log(np.exp(raw).sum(axis=1))
    chosen = raw[np.arange(num_rows), edited.argmax(axis=1)] - lse
    np.testing.assert_allclose(result.logprobs, chosen, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(result.top_ids)[:, 0], logits.argmax(axis=1))


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.float32([5, 5, 1, 0, 5])
    num_draws = 500
    edits = [(row, token, 0, 0, -np.inf) for row in range(num_draws) for token in (0, 1, 4)]
    inputs = make_inputs(num_draws, position=np.arange(num_draws), edits=edits)
    ids = np.asarray(sample(np.broadcast_to(logits, (num_draws, 5)), inputs, num_top=0).token_ids)
    assert set(ids.tolist()) == {2, 3}


def test_padding_and_tokens_outside_the_vocabulary_edit_nothing() -> None:
    logits = np.float32([[1, 2, 3], [3, 2, 1]])
    inputs = make_inputs(2, temperature=0, edits=[(0, 3, 0, 0, 9.0), (1, -1, 0, 0, 9.0), (1, 2**31 - 1, 0, 0, 9.0)])
    assert sample(logits, inputs, num_top=0).token_ids.tolist() == [2, 0]


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros((1, 40), np.float32)
    logits[0, [3, 9, 20]] = 2
    logits[0, 5] = -0.0
    assert greedy(logits).tolist() == [3]
    result = sample(logits, make_inputs(1, temperature=0), num_top=6)
    assert result.token_ids.tolist() == [3]
    assert result.top_ids.tolist() == [[3, 9, 20, 0, 1, 2]]
    assert set(draws(logits[0], 300, top_k=2).tolist()) == {3, 9}
    assert set(draws(logits[0], 300, top_p=1e-6).tolist()) == {3}
    top_p_two = 1.5 * math.exp(2) / (3 * math.exp(2) + 37)
    assert set(draws(logits[0], 300, top_p=top_p_two).tolist()) == {3, 9}
    assert set(draws(np.zeros(40, np.float32), 300, top_k=5).tolist()) == set(range(5))


@pytest.mark.parametrize("num_top", [1, 5, 20])
def test_top_logprobs(num_top: int) -> None:
    logits = (np.random.default_rng(3).standard_normal((3, 12)) * 4).astype(np.float32)
    result = sample(logits, make_inputs(3), num_top=num_top)
    assert result.top_ids.shape == result.top_logprobs.shape == (3, num_top)
    found = min(num_top, 12)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :found]
    np.testing.assert_array_equal(np.asarray(result.top_ids)[:, :found], order)
    np.testing.assert_allclose(
        np.asarray(result.top_logprobs)[:, :found], np.take_along_axis(exact, order, 1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(result.logprobs, exact[np.arange(3), np.asarray(result.token_ids)], rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(result.top_ids)[:, found:] == -1)
    assert np.all(np.asarray(result.top_logprobs)[:, found:] == -np.inf)


def test_without_num_top_nothing_is_summed() -> None:
    logits = np.zeros((2, 8), np.float32)
    result = sample(logits, make_inputs(2), num_top=0)
    assert result.top_ids.shape == (2, 0)
    assert result.logprobs.tolist() == [0.0, 0.0]
    graph = str(jax.make_jaxpr(partial(reference.sample, num_top=0))(logits, make_inputs(2, temperature=0)))
    assert "top_k" not in graph


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_usable_logit_give_minus_one_and_spoil_no_other(temperature: float) -> None:
    nan, inf = np.nan, np.inf
    logits = np.float32([[1, nan, 3], [-inf, -inf, -inf], [1, 2, 30], [nan, nan, nan], [0, inf, 5], [F32_MAX, 0, -inf]])
    result = sample(logits, make_inputs(6, temperature=temperature), num_top=1)
    assert result.token_ids.tolist() == [-1, -1, 2, -1, 1, 0]
    assert greedy(logits).tolist() == [-1, -1, 2, -1, 1, 0]
    assert result.top_ids[:, 0].tolist() == [-1, -1, 2, -1, 1, 0]
    np.testing.assert_allclose(result.logprobs, [nan, nan, 0, nan, 0, 0], atol=1e-6)


def test_a_row_with_everything_masked_gives_minus_one() -> None:
    edits = [(0, token, 0, 0, -np.inf) for token in range(3)]
    for temperature in (0.0, 1.0):
        result = sample(np.zeros((1, 3), np.float32), make_inputs(1, temperature=temperature, edits=edits), num_top=0)
        assert result.token_ids.tolist() == [-1]


@pytest.mark.parametrize("temperature", [1e-38, 1e-5, 1e-3])
def test_tiny_temperatures_are_all_but_greedy(temperature: float) -> None:
    logits = np.float32([1, 3, 2.9, 0])
    assert set(draws(logits, 200, temperature=temperature).tolist()) == {1}


def test_greedy_equals_the_full_operation() -> None:
    logits = (np.random.default_rng(4).standard_normal((50, 7)) * 2).round().astype(np.float32)
    logits[3, 2] = np.nan
    full = sample(logits, make_inputs(50, temperature=0), num_top=0)
    np.testing.assert_array_equal(greedy(logits), full.token_ids)


def test_only_allowed_tokens_are_picked_and_log_probabilities_stay_raw() -> None:
    rng = np.random.default_rng(3)
    vocab_size, num_rows = 70, 400
    logits = np.broadcast_to(rng.standard_normal(vocab_size).astype(np.float32), (num_rows, vocab_size))
    allowed = np.zeros((num_rows, 96), bool)
    allowed[:, [3, 31, 32, 69]] = True
    allowed[0] = False
    allowed[1] = True
    masks = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    for params in ({}, {"temperature": 0}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}):
        free = make_inputs(
            num_rows, position=np.arange(num_rows), edits=[(2, 69, 0, 0, 100.0), (2, 5, 0, 0, 200.0)], **params
        )
        got = sample(logits, free._replace(allowed=masks), num_top=4)
        without = sample(logits, free, num_top=4)
        ids = np.asarray(got.token_ids)
        assert ids[0] == -1 and ids[2] == 69 and set(ids[3:].tolist()) <= {3, 31, 32, 69}
        assert ids[1] == without.token_ids[1]
        np.testing.assert_array_equal(got.top_logprobs, without.top_logprobs)
        np.testing.assert_allclose(got.logprobs[3:], jax.nn.log_softmax(logits[0])[ids[3:]], rtol=1e-5)


def test_draws_among_allowed_tokens_follow_their_distribution() -> None:
    logits = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    num_draws = 20_000
    inputs = make_inputs(num_draws, position=np.arange(num_draws))
    masks = np.full((num_draws, 1), 0b1010, np.uint32)
    ids = sample(np.broadcast_to(logits, (num_draws, 4)), inputs._replace(allowed=masks), num_top=0).token_ids
    np.testing.assert_allclose(np.bincount(ids, minlength=4) / num_draws, [0, 0.75, 0, 0.25], atol=0.015)
