"""What the quantised formats of Hugging Face folders share: a weight stored as several tensors, and its exact value."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.values import DENSE_DTYPES, GROUP_LEN, GroupQuantized, TensorInfo, TensorValue

CURE = "use a GPTQ or AWQ version without that, an unquantised version of the model, or a GGUF file"
INTEGER_FORMATS = ("INT4", "INT8")
"""Formats of a TensorInfo whose value is (but for scales that float16 cannot hold) a GroupQuantized."""

SCATTERED = (
    "have groups that scatter over the input features (act-order, desc_act) or are no multiple of 32 of them, which no"
    " kernel takes: they are held as 16-bit floats; a version without act-order stays in 4 bits"
)
_CHUNK_WEIGHTS = 1 << 22
"""Weights that are held as float32 at a time."""


class TensorSource(Protocol):
    """Tensors as files hold them."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """The tensor, of whatever dtype it is stored in."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight that is stored as several tensors."""

    info: TensorInfo
    """Of the weight itself; `num_bytes` is what its value takes."""
    parts: tuple[str, ...]
    """The tensors that hold it."""
    decode: Callable[[], TensorValue]
    loss: str = ""
    """Why the value takes more memory than the file; "" when it does not."""


Quantizer = Callable[[Mapping[str, Any], TensorSource], list[StoredWeight]]
"""Finds the quantised weights among the tensors, by the quantiser's settings. Raises UnsupportedError, FormatError."""


def check_settings(
    settings: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], harmless: str, path: Path
) -> None:
    """Raises UnsupportedError for a value that is none of `accepted`, or a key that is neither there nor in `harmless`.

    Keys that `accepted` maps to () may have any value: the caller checks them.
    """
    known = frozenset(harmless.split())
    for key, value in settings.items():
        values = accepted.get(key)
        if values is None and key not in known:
            raise refuse(settings, key, "only keys Strop knows", path)
        if values and not any(type(value) is type(one) and value == one for one in values):
            raise refuse(settings, key, " or ".join("null" if one is None else repr(one) for one in values), path)


def refuse(settings: Mapping[str, Any], key: str, accepted: str, path: Path) -> UnsupportedError:
    """The error for a setting that Strop cannot follow."""
    found = f"has {key}={settings[key]!r}" if key in settings else f"lacks {key}"
    return UnsupportedError(f"{path}: the model's quantization_config {found}; accepted is {accepted}: {CURE}")


def group_size_of(settings: Mapping[str, Any], key: str, k_len: int, path: Path) -> int:
    """Weights of a row that share a scale; -1 stands for the whole row."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise refuse(settings, key, "an integer above 0, or -1", path)
    return k_len if value == -1 else value


def find_part(
    source: TensorSource, name: str, kinds: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> TensorInfo:
    """What the file says about a part. Raises FormatError when it is missing, or of another dtype or shape."""
    info = source.tensors.get(name)
    if info is None:
        raise FormatError(
            f"{source.path}: the tensor {name!r} of a quantised weight is missing; the model is incomplete: download it"
            " again"
        )
    if info.format not in kinds or (shape is not None and info.shape != shape):
        expected = " or ".join(kinds) + (f" {shape}" if shape is not None else "")
        raise FormatError(
            f"{source.path}: the tensor {name!r} is {info.format} {info.shape}, expected {expected}; the model is"
            " damaged or its quantization_config belongs to another one"
        )
    return info


def words_shape(source: TensorSource, name: str) -> tuple[int, int]:
    """Shape of a matrix of 32-bit words that hold codes."""
    shape = find_part(source, name, ("I32", "U32")).shape
    if len(shape) != 2 or 0 in shape:
        raise FormatError(f"{source.path}: the tensor {name!r} has shape {shape}, expected a matrix; download it again")
    return shape


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in each row of 32-bit words [N, W], the lowest bits first: uint8 [N, W * 32 / bits]; bits is 4 or 8."""
    bytes_ = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return bytes_
    codes = np.empty((bytes_.shape[0], bytes_.shape[1] * 2), np.uint8)
    np.bitwise_and(bytes_, 0x0F, out=codes[:, 0::2])
    np.right_shift(bytes_, 4, out=codes[:, 1::2])
    return codes


def fits_groups(group_of: np.ndarray) -> bool:
    """Whether every run of 32 weights of a row lies in one group; `group_of` is int [K]."""
    if len(group_of) % GROUP_LEN:
        return False
    runs = group_of.reshape(-1, GROUP_LEN)
    return bool((runs == runs[:, :1]).all())


def integer_weight(
    name: str,
    shape: tuple[int, int],
    bits: int,
    group_of: np.ndarray,
    scale_format: str,
    has_zeros: bool,
    parts: Iterable[str],
    decode: Callable[[], TensorValue],
) -> StoredWeight:
    """A weight that `integer_value` decodes: "INT4" or "INT8", or the scale's format where groups are scattered."""
    num_weights = shape[0] * shape[1]
    if fits_groups(group_of):
        num_bytes = num_weights * bits // 8 + num_weights // GROUP_LEN * 2 * (1 + has_zeros)
        return StoredWeight(TensorInfo(name, shape, f"INT{bits}", num_bytes), tuple(parts), decode)
    info = TensorInfo(name, shape, scale_format, num_weights * DENSE_DTYPES[scale_format].itemsize)
    return StoredWeight(info, tuple(parts), decode, SCATTERED)


def integer_value(
    codes: np.ndarray, scale: np.ndarray, zero: int | np.ndarray, bits: int, group_of: np.ndarray
) -> TensorValue:
    """scale * (codes - zero): exact in groups of 32; rounded to the scale's dtype where no group of 32 has one scale.

    Args:
        codes: uint8 [N, K].
        scale: float16, bfloat16 or float32 [N, G].
        zero: one for all, or uint8 [N, G].
        group_of: int [K], the group (below G) of each input feature.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not fits_groups(group_of) or not np.array_equal(half.astype(np.float32), scale.astype(np.float32)):
        return _dense_value(codes, scale, zero, group_of)
    group_of = group_of[::GROUP_LEN]
    if isinstance(zero, np.ndarray):
        middle = 1 << bits - 1
        zero = middle if (zero == middle).all() else zero[:, group_of]
    return GroupQuantized(codes, half[:, group_of], None, zero, bits)


def _dense_value(codes: np.ndarray, scale: np.ndarray, zero: int | np.ndarray, group_of: np.ndarray) -> np.ndarray:
    weights = np.empty(codes.shape, scale.dtype)
    at_once = max(1, _CHUNK_WEIGHTS // max(1, codes.shape[1]))
    for start in range(0, len(codes), at_once):
        rows = slice(start, start + at_once)
        levels = codes[rows].astype(np.float32)
        levels -= zero[rows][:, group_of] if isinstance(zero, np.ndarray) else np.float32(zero)
        levels *= scale[rows].astype(np.float32)[:, group_of]
        weights[rows] = levels.astype(scale.dtype)
    return weights


_OF_ACTIVATIONS = re.compile(
    r".*\.((input|output|activation)_(scale|zero_point)(_ub)?|[qkv]_scale|[qkv]_zero_point|prob_output_scale)"
)


def is_of_activations(tensor_name: str) -> bool:
    """Whether it says how to round activations or the cache, which no weight needs."""
    return _OF_ACTIVATIONS.fullmatch(tensor_name) is not None
