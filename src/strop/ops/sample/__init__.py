"""Picking the next token: what goes in and what comes out. No jax here; `reference.py` holds the definition."""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""numpy on the host, `jax.Array` inside a step."""

TEMPERATURE, TOP_P, MIN_P, REPETITION_PENALTY, PRESENCE_PENALTY, FREQUENCY_PENALTY = range(6)
"""Columns of `SampleInputs.floats`."""
NUM_FLOATS = 6
TOP_K, SEED_LO, SEED_HI, POSITION = range(4)
"""Columns of `SampleInputs.ints`."""
NUM_INTS = 4
ALL_ALLOWED = np.zeros((0, 0), np.uint32)
"""`SampleInputs.allowed` when no row is constrained."""


class SampleInputs(NamedTuple):
    """Per-row parameters of one step, and sparse edits of its logits: few arrays, since each one costs dispatch time.

    An edit changes one (row, token) logit; pairs are unique. Edits are sorted by row and padding (row -1) comes last,
    so that a kernel finds a row's edits by bisection.
    """

    floats: Array
    """f32 [R, 6]: temperature (0 is greedy), top_p, min_p, repetition, presence and frequency penalty."""
    ints: Array
    """u32 [R, 4]: top_k (0 keeps all), seed bits 0-31, seed bits 32-63, index of the token among the generated ones."""
    edit_row: Array
    """i32 [E]; -1 is padding."""
    edit_token: Array
    """i32 [E]; an edit of a token outside the vocabulary is ignored."""
    edit_count: Array
    """i32 [E]: how often the answer has this token so far (presence and frequency penalty)."""
    edit_seen: Array
    """i32 [E]: 1 when the prompt or the answer has this token (repetition penalty), else 0."""
    edit_bias: Array
    """f32 [E]: added after the penalties; -inf forbids the token."""
    allowed: Array = ALL_ALLOWED
    """u32 [R, ceil(V / 32)]: token t may be picked if bit t % 32 of word t // 32 is set; or [0, 0]: all may."""


class SampleOutputs(NamedTuple):
    """What one step sampled. Log probabilities are those of the raw logits, before any edit or temperature."""

    token_ids: Array
    """i32 [R]; -1 where the logits hold a NaN or no token is left to choose."""
    logprobs: Array
    """f32 [R] of the chosen token; zeros when num_top is 0, NaN where the token is -1."""
    top_ids: Array
    """i32 [R, num_top], most probable first, ties by ascending id; -1 beyond the vocabulary's end or in a NaN row."""
    top_logprobs: Array
    """f32 [R, num_top]; -inf beyond the vocabulary's end, NaN in a NaN row."""
