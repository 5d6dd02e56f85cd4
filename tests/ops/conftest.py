"""Every implementation of an operation that runs here, as one parameter."""

from collections.abc import Iterator

import jax
import pytest

from strop.ops import native

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set of the native library; skips those this machine lacks."""
    if not native.register():
        pytest.skip("the native library is not built")
    before = native.isa()
    if not native.select_isa(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    native.select_isa(str(before))
