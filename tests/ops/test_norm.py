"""The norm by itself: every ISA against the reference, and each row against itself in any crowd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strop.ops import native
from strop.ops.norm import Norm, add_norm


def norm_of(rng, kind, bias, length):
    weight, shift = (jnp.asarray(rng.standard_normal((3, length)), jnp.float32) for _ in range(2))
    return None if kind is None else Norm(kind, weight, shift if bias else None, 1e-5, 1)


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("kind", "bias"), [("rms", False), ("layer", False), ("layer", True), (None, False)])
def test_norm_is_the_references(isa, kind, bias, residual, length):
    rng = np.random.default_rng(3)
    x, before = (jnp.asarray(3 + rng.standard_normal((37, length)), jnp.float32) for _ in range(2))
    options = {"scale": 0.25, "residual": before if residual else None}
    norm = norm_of(rng, kind, bias, length)

    def run(num_rows):
        counts = jnp.array([num_rows], jnp.int32)
        return np.asarray(add_norm(x, norm, counts, platform="native", **options))[:num_rows]

    whole = run(37)
    expected = add_norm(x, norm, jnp.array([37], jnp.int32), platform="xla", **options)
    np.testing.assert_allclose(whole, expected, rtol=2e-6, atol=2e-6)
    native.set_num_threads(3)
    try:
        for num_rows in (1, 9, 37):
            np.testing.assert_array_equal(run(num_rows), whole[:num_rows])
    finally:
        native.set_num_threads(1)


def test_a_norm_of_another_length_is_refused(isa):
    norm = norm_of(np.random.default_rng(3), "rms", False, 48)
    with pytest.raises(Exception, match="the norm's length must be D"):
        jax.block_until_ready(add_norm(jnp.zeros((2, 64)), norm, jnp.array([2], jnp.int32), platform="native"))
