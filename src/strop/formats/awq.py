"""AWQ weights in AutoAWQ's "gemm" layout: `NAME.qweight`, `.qzeros` and `.scales`, eight outputs to a word."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from strop.core.errors import FormatError
from strop.formats.quantized import (
    StoredWeight,
    TensorSource,
    check_settings,
    find_part,
    group_size_of,
    integer_value,
    integer_weight,
    refuse,
    unpack_words,
    words_shape,
)
from strop.formats.values import DENSE_DTYPES, TensorValue

_FIELD_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word holds its outputs: it keeps the even ones in its low half, the odd ones in its high half."""
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "bits": (4,),
    "w_bit": (4,),
    "version": ("gemm", "GEMM"),
    "format": ("gemm", "GEMM", None),
    "zero_point": (True,),
    "group_size": (),
    "q_group_size": (),
    "backend": (),
}
_HARMLESS = """quant_method method modules_to_not_convert ignore modules_to_fuse do_fuse fuse_max_seq_len exllama_config
    meta lm_head pack_dtype sym desc_act dynamic"""


def awq_weights(settings: Mapping[str, Any], source: TensorSource) -> list[StoredWeight]:
    """The weights with a `.qweight`. Raises UnsupportedError for other layouts, FormatError for parts that disagree."""
    check_settings(settings, _ACCEPTED, _HARMLESS, source.path)
    if settings.get("backend") == "llm-awq":
        raise refuse(settings, "backend", "'autoawq'", source.path)
    if settings.get("dynamic"):
        raise refuse(settings, "dynamic", "null", source.path)
    stems = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    return [_weight(stem, settings, source) for stem in stems]


def _weight(stem: str, settings: Mapping[str, Any], source: TensorSource) -> StoredWeight:
    k_len, num_words = words_shape(source, f"{stem}.qweight")
    num_rows = num_words * 8
    group_len = group_size_of(
        settings, "group_size" if "group_size" in settings else "q_group_size", k_len, source.path
    )
    if k_len % group_len:
        raise FormatError(f"{source.path}: {stem!r} has rows of {k_len} weights, not whole groups of {group_len}")
    scale = find_part(source, f"{stem}.scales", tuple(DENSE_DTYPES), (k_len // group_len, num_rows))
    find_part(source, f"{stem}.qzeros", ("I32", "U32"), (k_len // group_len, num_words))
    group_of = np.arange(k_len) // group_len
    parts = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales"))
    decode = partial(_decode, stem, group_of, source)
    return integer_weight(f"{stem}.weight", (num_rows, k_len), 4, group_of, scale.format, True, parts, decode)


def _decode(stem: str, group_of: np.ndarray, source: TensorSource) -> TensorValue:
    codes, zero = (_by_output(source.read(f"{stem}.{part}")) for part in ("qweight", "qzeros"))
    scale = np.ascontiguousarray(source.read(f"{stem}.scales").T)
    return integer_value(codes, scale, zero, 4, group_of)


def _by_output(words: np.ndarray) -> np.ndarray:
    """Words [K, N / 8] -> codes uint8 [N, K]."""
    fields = unpack_words(words, 4).reshape(*words.shape, 8)
    return np.ascontiguousarray(fields[:, :, _FIELD_OF_OUTPUT].reshape(len(words), -1).T)
