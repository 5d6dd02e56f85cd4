"""The windows that `bench` and `eval` measure on, and the intervals they print."""

import numpy as np
import pytest

from strop.bench.fidelity import MIN_TOKENS, Interval, Likelihood, english_text, token_windows
from strop.core.errors import RequestError, StropError


def test_windows_are_the_text_in_order() -> None:
    windows = token_windows(np.arange(1000, dtype=np.int32), 3, 200)
    np.testing.assert_array_equal(windows, np.arange(600).reshape(3, 200))
    assert windows.dtype == np.int32


def test_every_window_begins_with_the_prefix() -> None:
    windows = token_windows(np.arange(1000, dtype=np.int32), 9, 200, [7, 8])
    assert windows.shape == (5, 200)
    np.testing.assert_array_equal(windows[:, :2], [[7, 8]] * 5)
    np.testing.assert_array_equal(windows[:, 2:].ravel(), np.arange(990))


def test_a_short_text_makes_one_short_window() -> None:
    assert token_windows(np.zeros(MIN_TOKENS, np.int32), 9, 512, [1]).shape == (1, MIN_TOKENS + 1)
    with pytest.raises(RequestError, match=f"{MIN_TOKENS - 1} tokens"):
        token_windows(np.zeros(MIN_TOKENS - 1, np.int32), 9, 512)
    with pytest.raises(RequestError, match="longer windows"):
        token_windows(np.zeros(1000, np.int32), 9, 32)


def test_perplexity_of_known_distributions() -> None:
    """Uniform logits give the vocabulary's size, exactly; a model that knows the text gives 1."""
    windows = np.random.default_rng(0).integers(0, 50, (2, 100)).astype(np.int32)
    for scale, expected in ((0.0, 50.0), (100.0, 1.0)):
        seen = Likelihood()
        logits = [scale * np.eye(50, dtype=np.float32)[np.append(window[1:], 0)] for window in windows]
        passed = list(seen.watch(logits, windows))
        assert all(after is before for after, before in zip(passed, logits, strict=True))
        assert seen.perplexity == Interval(*[pytest.approx(expected, rel=1e-5)] * 3)


def test_a_perplexity_is_always_a_number() -> None:
    windows = np.zeros((1, 100), np.int32)
    seen, logits = Likelihood(), np.zeros((100, 2), np.float32)
    logits[:, 1] = 1e6
    list(seen.watch([logits], windows))
    assert np.isfinite(seen.perplexity.high) and seen.perplexity.high > 1e300
    logits[50, 0] = np.nan
    with pytest.raises(StropError, match=r"window 2: .*not numbers"):
        list(seen.watch([logits], windows))


def test_the_interval_holds_the_mean_and_grows_with_the_spread() -> None:
    windows = np.random.default_rng(0).integers(0, 50, (4, 200)).astype(np.int32)
    widths = []
    for spread in (0.5, 3.0):
        rng = np.random.default_rng(1)
        seen = Likelihood()
        list(seen.watch([rng.normal(size=(200, 50)).astype(np.float32) * spread for _ in windows], windows))
        found = seen.perplexity
        assert found.low < found.mean < found.high
        widths.append(np.log(found.high / found.low))
    assert widths[1] > 2 * widths[0]


def test_the_built_in_text_is_long_enough() -> None:
    assert len(english_text()) > 20_000
