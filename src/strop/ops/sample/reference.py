"""The definition of sampling, in plain `jnp`: float32 throughout, any platform, under `jit`.

Order: raw logits; repetition penalty; presence and frequency penalties; bias; only allowed tokens; then the largest
logit if the temperature is 0, else division by the temperature, top-k, top-p over what top-k kept, min-p, and one
Gumbel-max draw (Gumbel 1954; argmax of log p + g is distributed as p). Ties always go to the lower token id.

Numbers come from a counter, not from a state: the draw for a token is a function of (seed, position, token) alone, so
that a row's answer does not depend on who shares the step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from strop.ops.sample import (
    FREQUENCY_PENALTY,
    MIN_P,
    POSITION,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    SEED_HI,
    SEED_LO,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SampleInputs,
    SampleOutputs,
)

FLOAT32_MAX = np.float32(3.4028235e38)
MIN_TEMPERATURE = np.float32(1e-5)
"""Smaller positive temperatures count as this one: the quotient must not depend on how subnormals are treated."""


def greedy(logits: jax.Array) -> jax.Array:
    """Token id of the largest logit, i32 [R]: what `sample` returns for plain greedy rows, at the cost of one pass.

    logits: f32 [R, V]. -1 where the row holds a NaN or nothing above -inf.
    """
    finite_top = jnp.minimum(logits, FLOAT32_MAX)
    return jnp.where(_is_hopeless(finite_top), np.int32(-1), jnp.argmax(finite_top, axis=-1).astype(jnp.int32))


def sample(logits: jax.Array, inputs: SampleInputs, *, num_top: int) -> SampleOutputs:
    """One token per row.

    logits: f32 [R, V]; +inf counts as the largest finite float32. num_top is static; 0 means that nobody asked for log
    probabilities, and costs no log-sum-exp. Accumulates in float32.
    """
    inputs = SampleInputs(*(jnp.asarray(array) for array in inputs))
    # A single zero, so that no sort tells -0 from +0.
    raw = jnp.where(logits == 0, np.float32(0), jnp.minimum(logits, FLOAT32_MAX))  # [R, V]
    edited = _only_allowed(_apply_edits(raw, inputs), inputs.allowed)
    temperature = inputs.floats[:, TEMPERATURE]
    best_ids = jnp.argmax(edited, axis=-1).astype(jnp.int32)
    drawn_ids = lax.cond(jnp.any(temperature > 0), lambda: _draw(edited, inputs), lambda: best_ids)
    hopeless = _is_hopeless(raw)
    token_ids = jnp.where(temperature > 0, drawn_ids, best_ids)
    token_ids = jnp.where(hopeless | _is_hopeless(edited), np.int32(-1), token_ids)
    return SampleOutputs(token_ids, *_logprobs(raw, hopeless, token_ids, num_top))


def gumbel(ints: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise f32 [R, V] from seed and position of each row (`SampleInputs.ints`) and the token id.

    With mix = murmur3's 32-bit finaliser (Appleby 2011) and chain(c) = mix(mix(mix(c ^ seed_lo) ^ seed_hi) ^ position),
    h = mix(mix(token ^ chain(0x9E3779B9)) + chain(0x7F4A7C15)). Then v = (h >> 1 + 1/2) / 2^31, at most 1 - 2^-24, and
    g = -log(-log(1 - v)). Small v, not v near 1, gives the large g: float32 is fine near 0, so improbable tokens
    keep their probability (to about 2^-31).
    """
    seed_lo, seed_hi, position = (ints[:, column] for column in (SEED_LO, SEED_HI, POSITION))

    def chain(constant: int) -> jax.Array:
        return _mix(_mix(_mix(np.uint32(constant) ^ seed_lo) ^ seed_hi) ^ position)[:, None]

    tokens = jnp.arange(vocab_size, dtype=jnp.uint32)[None, :]
    hashed = _mix(_mix(tokens ^ chain(0x9E3779B9)) + chain(0x7F4A7C15))  # [R, V]
    half = (hashed >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32)
    uniform = jnp.minimum((half + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-uniform))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _is_hopeless(logits: jax.Array) -> jax.Array:
    largest = jnp.max(logits, axis=-1)
    return jnp.isnan(largest) | (largest == -jnp.inf)


def _apply_edits(raw: jax.Array, inputs: SampleInputs) -> jax.Array:
    num_rows, vocab_size = raw.shape
    if inputs.edit_row.shape[0] == 0:
        return raw
    # Out-of-range pairs are dropped; a negative index would wrap round instead.
    inside = (inputs.edit_row >= 0) & (inputs.edit_token >= 0) & (inputs.edit_token < vocab_size)
    rows = jnp.where(inside, inputs.edit_row, np.int32(num_rows))
    tokens = jnp.where(inside, inputs.edit_token, np.int32(0))
    floats = inputs.floats.at[rows].get(mode="fill", fill_value=0)  # [E, 6]
    value = raw.at[rows, tokens].get(mode="fill", fill_value=0)  # [E]
    repetition = floats[:, REPETITION_PENALTY]
    penalised = jnp.where(value > 0, value / repetition, value * repetition)
    value = jnp.where(inputs.edit_seen > 0, penalised, value)
    count = inputs.edit_count.astype(jnp.float32)
    presence = jnp.where(inputs.edit_count > 0, floats[:, PRESENCE_PENALTY], np.float32(0))
    value = value - presence - floats[:, FREQUENCY_PENALTY] * count + inputs.edit_bias
    return raw.at[rows, tokens].set(jnp.minimum(value, FLOAT32_MAX), mode="drop")


def _only_allowed(edited: jax.Array, allowed: jax.Array) -> jax.Array:
    if allowed.shape[0] == 0:
        return edited
    tokens = np.arange(edited.shape[-1])
    bits = allowed[:, tokens // 32] >> jnp.asarray(tokens % 32, jnp.uint32)[None, :]  # [R, V]
    return jnp.where(bits & np.uint32(1) == 1, edited, -jnp.inf)


def _draw(edited: jax.Array, inputs: SampleInputs) -> jax.Array:
    """Sampled token ids i32 [R]; greedy rows get an answer nobody uses."""
    vocab_size = edited.shape[-1]
    temperature = jnp.maximum(inputs.floats[:, TEMPERATURE], MIN_TEMPERATURE)[:, None]
    scaled = (edited - jnp.max(edited, axis=-1, keepdims=True)) / temperature  # [R, V], at most 0
    top_k = inputs.ints[:, TOP_K]
    num_kept_max = jnp.where(top_k == 0, vocab_size, jnp.minimum(top_k, np.uint32(vocab_size)).astype(jnp.int32))
    top_p = inputs.floats[:, TOP_P]
    cuts = jnp.any((num_kept_max < vocab_size) | (top_p < 1))
    kept = lax.cond(
        cuts, lambda: _top_k_top_p(scaled, num_kept_max, top_p), lambda: jnp.ones_like(scaled, dtype=jnp.bool_)
    )
    kept &= scaled >= jnp.log(inputs.floats[:, MIN_P])[:, None]
    score = jnp.where(kept, scaled + gumbel(inputs.ints, vocab_size), -jnp.inf)
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def _top_k_top_p(scaled: jax.Array, num_kept_max: jax.Array, top_p: jax.Array) -> jax.Array:
    """Mask bool [R, V] of the smallest set of most probable tokens, at most num_kept_max, that holds top_p of them."""
    vocab_size = scaled.shape[-1]
    order = jnp.argsort(-scaled, axis=-1, stable=True)  # [R, V]
    descending = jnp.take_along_axis(scaled, order, axis=-1)
    in_top_k = jnp.arange(vocab_size, dtype=jnp.int32)[None, :] < num_kept_max[:, None]
    mass = jnp.cumsum(jnp.where(in_top_k, jnp.exp(descending), np.float32(0)), axis=-1)
    below = jnp.sum(mass < top_p[:, None] * mass[:, -1:], axis=-1, dtype=jnp.int32)
    num_kept = jnp.where(top_p < 1, jnp.minimum(below + 1, num_kept_max), num_kept_max)
    last = (num_kept - 1)[:, None]
    last_value = jnp.take_along_axis(descending, last, axis=-1)
    last_id = jnp.take_along_axis(order, last, axis=-1)
    ids = jnp.arange(vocab_size, dtype=last_id.dtype)[None, :]
    return (scaled > last_value) | ((scaled == last_value) & (ids <= last_id))


def _logprobs(
    raw: jax.Array, hopeless: jax.Array, token_ids: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_rows, vocab_size = raw.shape
    if num_top == 0:
        none = jnp.zeros((num_rows, 0), jnp.int32)
        return jnp.zeros(num_rows, jnp.float32), none, none.astype(jnp.float32)
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(token_ids, 0)[:, None], axis=-1)[:, 0]
    chosen = jnp.where(token_ids < 0, np.float32(np.nan), chosen)
    num_found = min(num_top, vocab_size)
    _, top_ids = lax.top_k(raw, num_found)  # of the logits: equal log probabilities may come of unequal logits
    top_logprobs = jnp.take_along_axis(logprobs, top_ids, axis=-1)
    padding = ((0, 0), (0, num_top - num_found))
    top_ids = jnp.pad(top_ids.astype(jnp.int32), padding, constant_values=-1)
    top_logprobs = jnp.pad(top_logprobs, padding, constant_values=-jnp.inf)
    hopeless = hopeless[:, None]
    return chosen, jnp.where(hopeless, np.int32(-1), top_ids), jnp.where(hopeless, np.float32(np.nan), top_logprobs)
