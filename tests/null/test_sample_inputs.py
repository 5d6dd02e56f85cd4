import random
from types import SimpleNamespace

import numpy as np
import pytest

from strop.core.request import Request, SamplingParams
from strop.engine.sample import SampleRow, build_sample_inputs, edit_bucket, needs_full
from strop.engine.sequence import Choices, Sequence
from strop.ops.sample import SampleInputs

VOCAB = 50


def make_row(params: SamplingParams, tokens: list[int], prompt_len: int, seed: int = 7, finish: tuple[int, ...] = ()):
    return SampleRow(params, seed, tokens, prompt_len, finish_token_ids=finish)


def test_a_row_of_a_sequence_follows_its_tokens() -> None:
    params = SamplingParams(min_tokens=2, seed=5)
    request = Request("r", (1, 2), params)
    seq = Sequence(0, Choices(request), 0, 5, 16, frozenset({9}), [1, 2], 2, [[]])
    row = SampleRow.of(seq)
    assert edits_of(build_sample_inputs([row], 1), 0) == {9: (0, 0, -np.inf)}
    seq.token_ids.extend([3, 4])
    inputs = build_sample_inputs([row], 1)
    assert edits_of(inputs, 0) == {}
    assert inputs.ints[0].tolist() == [0, 5, 0, 2]


def edits_of(inputs: SampleInputs, row: int) -> dict[int, tuple[int, int, float]]:
    """token -> (count, seen, bias); fails on a repeated pair."""
    at = np.flatnonzero(inputs.edit_row == row)
    assert len(set(inputs.edit_token[at].tolist())) == len(at)
    return {
        int(inputs.edit_token[i]): (int(inputs.edit_count[i]), int(inputs.edit_seen[i]), float(inputs.edit_bias[i]))
        for i in at
    }


def naive_edits(params: SamplingParams, tokens: list[int], prompt_len: int, finish: tuple[int, ...]):
    prompt, answer = tokens[:prompt_len], tokens[prompt_len:]
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    masked = finish if len(answer) < params.min_tokens else ()
    biases = {**(params.logit_bias or {}), **dict.fromkeys(masked, -np.inf)}
    counted = answer if penalised else []
    seen = set(counted) | (set(prompt) if params.repetition_penalty != 1 else set())
    return {
        token: (counted.count(token), int(token in seen), float(np.float32(biases.get(token, 0.0))))
        for token in seen | set(biases)
    }


def drop_idle(edits: dict[int, tuple[int, int, float]]) -> dict[int, tuple[int, int, float]]:
    return {token: edit for token, edit in edits.items() if edit != (0, 0, 0.0)}


@pytest.mark.parametrize("trial", range(20))
def test_incremental_counts_equal_a_recount(trial: int) -> None:
    rng = random.Random(trial)
    rows, specs = [], []
    for i in range(4):
        params = SamplingParams(
            max_tokens=None,
            temperature=rng.choice([0.0, 0.7]),
            min_tokens=rng.choice([0, 3]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.5]),
            logit_bias=rng.choice([None, {3: 1.5, 4: -2.25}]),
        )
        prompt_len = rng.randint(1, 40)
        tokens = [rng.randrange(VOCAB) for _ in range(prompt_len)]
        finish = rng.choice([(), (2,), (2, 3)])
        rows.append(make_row(params, tokens, prompt_len, seed=i, finish=finish))
        specs.append((params, tokens, prompt_len, finish))
    for _ in range(12):
        inputs = build_sample_inputs(rows, 6)
        used = inputs.edit_row[inputs.edit_row >= 0]
        assert np.all(np.diff(used) >= 0)  # sorted
        assert np.all(inputs.edit_row[len(used) :] == -1)  # padding last
        for i, (params, tokens, prompt_len, finish) in enumerate(specs):
            assert drop_idle(edits_of(inputs, i)) == drop_idle(naive_edits(params, tokens, prompt_len, finish))
            assert inputs.ints[i, 3] == len(tokens) - prompt_len
            tokens.extend(rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 1, 3])))


def test_a_step_reads_only_the_new_tokens() -> None:
    tokens = [1, 2, 3, 4]
    row = make_row(SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0), tokens, 3)
    build_sample_inputs([row], 1)
    tokens[:] = [9, 9, 9, 9, 5]  # what was read before is not looked at again
    assert edits_of(build_sample_inputs([row], 1), 0) == {
        1: (0, 1, 0.0),
        2: (0, 1, 0.0),
        3: (0, 1, 0.0),
        4: (1, 1, 0.0),
        5: (1, 1, 0.0),
    }


def test_columns_and_padding() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, min_p=0.1, top_k=10**12, repetition_penalty=1.25, presence_penalty=2.0
    )
    inputs = build_sample_inputs([make_row(params, [1, 2, 3], 1, seed=-1)], 2)
    np.testing.assert_array_equal(inputs.floats[0], np.float32([0.5, 0.9, 0.1, 1.25, 2.0, 0.0]))
    np.testing.assert_array_equal(inputs.floats[1], np.float32([0, 1, 0, 1, 0, 0]))
    assert inputs.ints.tolist() == [[0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 2], [0, 0, 0, 0]]
    assert [array.dtype.name for array in inputs] == [
        "float32",
        "uint32",
        "int32",
        "int32",
        "int32",
        "int32",
        "float32",
        "uint32",
    ]
    assert inputs.allowed.shape == (0, 0)
    masks = np.full((2, 5), 7, np.uint32)
    assert build_sample_inputs([], 2, masks).allowed is masks


def test_a_row_with_a_grammar_needs_its_mask_and_starts_where_its_answer_is() -> None:
    seen: list[tuple[int, int | None]] = []
    matcher = SimpleNamespace(advance=lambda *token_and_num_left: seen.append(token_and_num_left))
    for max_tokens in (None, 10):
        row = SampleRow(
            SamplingParams(temperature=0),
            0,
            [1, 2, 8, 9],
            2,
            finish_token_ids=(),
            matcher=matcher,
            max_tokens=max_tokens,
        )
        assert needs_full([row])
    assert seen == [(8, None), (9, None), (8, 9), (9, 8)]


def test_plain_greedy_rows_need_nothing() -> None:
    tokens = [1, 2]
    row = make_row(SamplingParams(temperature=0), tokens, 2, finish=(5,))
    assert not needs_full([row])
    assert np.all(build_sample_inputs([row], 1).edit_row == -1)
    assert not needs_full([])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
    ],
)
def test_any_wish_needs_the_full_step(change: dict) -> None:
    plain = make_row(SamplingParams(temperature=0), [1], 1)
    wishing = make_row(SamplingParams(**{"temperature": 0, **change}), [1], 1)
    assert needs_full([plain, wishing])


def test_min_tokens_masks_until_reached_then_the_row_is_plain_again() -> None:
    tokens = [1]
    row = make_row(SamplingParams(temperature=0, min_tokens=2), tokens, 1, finish=(5, 6))
    assert needs_full([row])
    assert edits_of(build_sample_inputs([row], 1), 0) == {5: (0, 0, -np.inf), 6: (0, 0, -np.inf)}
    tokens += [8, 9]
    assert not needs_full([row])
    assert edits_of(build_sample_inputs([row], 1), 0) == {}


def test_buckets_are_few_and_large_enough() -> None:
    lengths = {edit_bucket(n) for n in range(100_000)}
    assert len(lengths) <= 7
    assert all(edit_bucket(n) >= n for n in range(0, 100_000, 13))


def test_refuses_more_rows_than_room() -> None:
    row = make_row(SamplingParams(), [1], 1)
    with pytest.raises(ValueError, match="2 rows do not fit 1"):
        build_sample_inputs([row, row], 1)
