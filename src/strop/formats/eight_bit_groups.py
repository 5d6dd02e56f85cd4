"""Values rounded to the form every kernel has: 8-bit codes, groups of 32, float16 scales. What it costs is returned.

For formats without a kernel of their own (Q6_K, Q3_K and Q2_K have groups of 16 and scales in two levels).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.values import GROUP_LEN, GroupQuantized, Scale, TwoLevelScale, scale_values

_CHUNK_WEIGHTS = 1 << 20
"""Weights that are held as float32 at a time."""


@dataclass(frozen=True, slots=True)
class RoundingError:
    """How far rounded weights lie from the exact ones, relative to the largest exact weight of their group of 32."""

    rms: float
    """Over all weights; those of a group of zeros count as 0."""
    largest: float


def to_eight_bit_groups(value: GroupQuantized) -> tuple[GroupQuantized, RoundingError]:
    """The same weights with 8-bit codes, groups of 32 and float16 scales, and the error of that.

    The result has zero=128 and no offset; where `value` has an offset and that is closer (by rms), zero=0 and an
    offset. Groups of 32 keep their codes where that is closer: only scales and offsets are rounded, if at all.

    Raises UnsupportedError for weights beyond what float16 scales can hold, and ValueError for rows that are not whole
    groups of 32.
    """
    if value.shape[1] % GROUP_LEN:
        raise ValueError(f"rows of {value.shape[1]} weights are not whole groups of {GROUP_LEN}")
    if value.group_len == GROUP_LEN and _codes_can_stay(value):
        kept = _with_codes_kept(value)
        error = rounding_error(value, kept)
        if error.largest == 0:
            return kept, error
        candidates = [(kept, error)]
    else:
        candidates = []
    for with_offset in (False, True)[: 1 + (value.offset is not None)]:
        rounded = _with_new_codes(value, with_offset)
        candidates.append((rounded, rounding_error(value, rounded)))
    return min(candidates, key=lambda candidate: candidate[1].rms)


def _codes_can_stay(value: GroupQuantized) -> bool:
    if value.offset is not None:
        return value.zero == 0  # an offset excludes zeros by group
    return value.bits < 8 or isinstance(value.zero, int)


def rounding_error(exact: GroupQuantized, rounded: GroupQuantized) -> RoundingError:
    """How far `rounded` lies from `exact`; the same [N, K], K whole groups of 32."""
    sum_of_squares, largest = 0.0, 0.0
    for rows in _row_chunks(exact):
        weights = exact.take_rows(rows).dequantize().reshape(-1, GROUP_LEN)
        error = np.abs(rounded.take_rows(rows).dequantize().reshape(-1, GROUP_LEN) - weights)
        top = np.abs(weights).max(axis=1, keepdims=True)
        error /= np.where(top == 0, np.float32(1), top)
        sum_of_squares += float(np.sum(np.square(error, dtype=np.float64)))
        largest = max(largest, float(error.max(initial=0)))
    return RoundingError(float(np.sqrt(sum_of_squares / max(1, exact.codes.size))), largest)


def _row_chunks(value: GroupQuantized) -> Iterator[slice]:
    num_rows, k_len = value.shape
    at_once = max(1, _CHUNK_WEIGHTS // max(1, k_len))
    return (slice(start, start + at_once) for start in range(0, num_rows, at_once))


def _with_codes_kept(value: GroupQuantized) -> GroupQuantized:
    scale = _one_level(value.scale)
    if value.offset is None:
        return replace(value.with_zero_128(), scale=scale)
    return GroupQuantized(value.codes, scale, _one_level(value.offset), 0, 8)


def _one_level(scale: Scale) -> np.ndarray:
    return _to_float16(scale_values(scale)) if isinstance(scale, TwoLevelScale) else scale


def _with_new_codes(value: GroupQuantized, with_offset: bool) -> GroupQuantized:
    rows, columns = value.shape
    codes = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, columns // GROUP_LEN), np.float16)
    offset = np.empty_like(scale)
    for some in _row_chunks(value):
        weights = value.take_rows(some).dequantize().reshape(-1, GROUP_LEN)
        group_codes, group_scale, group_offset = _round_groups(weights, with_offset)
        codes[some] = group_codes.reshape(-1, columns)
        scale[some] = group_scale.reshape(-1, scale.shape[1])
        offset[some] = group_offset.reshape(-1, scale.shape[1])
    return GroupQuantized(codes, scale, offset, 0, 8) if with_offset else GroupQuantized(codes, scale, None, 128, 8)


def _round_groups(weights: np.ndarray, with_offset: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [G, 32] -> codes [G, 32] and float16 scale and offset [G, 1] (zeros without an offset)."""
    if with_offset:
        low = weights.min(axis=1, keepdims=True)
        offset = _to_float16(low)
        scale = _scale_of(weights.max(axis=1, keepdims=True) - offset.astype(np.float32), 255)
        zero = 0
    else:
        offset = np.zeros((len(weights), 1), np.float16)
        scale = _scale_of(np.abs(weights).max(axis=1, keepdims=True), 127)
        zero = 128
    steps = scale.astype(np.float32)
    steps[steps == 0] = 1
    scaled = (weights - offset.astype(np.float32)) / steps
    return (np.clip(np.rint(scaled), -zero, 255 - zero) + zero).astype(np.uint8), scale, offset


def _scale_of(span: np.ndarray, num_steps: int) -> np.ndarray:
    """The float16 step that reaches `span` in `num_steps`, to within half a step."""
    exact = np.maximum(span, 0) / np.float32(num_steps)
    scale = _to_float16(exact)
    # Among subnormals rounding down can lose more than half a step at the end of the range.
    too_short = scale.astype(np.float32) * np.float32(num_steps + 0.5) < span
    return np.where(too_short, np.nextafter(scale, np.float16(np.inf)), scale)


def _to_float16(numbers: np.ndarray) -> np.ndarray:
    largest = float(np.abs(numbers).max(initial=0))
    if not largest <= float(np.finfo(np.float16).max):
        raise UnsupportedError(
            f"a group of weights needs a scale or offset of {largest}, and 8-bit groups hold them in float16 (at most"
            " 65504): use a file with other tensor types"
        )
    return numbers.astype(np.float16)
