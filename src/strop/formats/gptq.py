"""GPTQ weights, as AutoGPTQ and GPTQModel store them: `NAME.qweight`, `.qzeros`, `.scales` and `.g_idx`."""

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

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "format": ("gptq", "gptq_v2", None),
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    "rotation": (None, ""),
    "adapter": (None, {}),
    "sym": (True, False),
    "desc_act": (True, False),
    "dynamic": (),
    "group_size": (),
}
_HARMLESS = """quant_method method meta lm_head damp_percent damp_auto_increment static_groups true_sequential
    model_name_or_path model_file_base_name tokenizer dataset backend use_cuda_fp16 model_seqlen
    block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id use_exllama disable_exllama
    max_input_length exllama_config cache_block_outputs modules_in_block_to_quantize modules_to_not_convert
    act_group_aware mse parallel_packing device offload_to_disk offload_to_disk_path quantizer version hyb_act v2
    v2_alpha v2_memory_device gptaq"""


def gptq_weights(settings: Mapping[str, Any], source: TensorSource) -> list[StoredWeight]:
    """The weights with a `.qweight`. Raises UnsupportedError for other layouts, FormatError for parts that disagree."""
    check_settings(settings, _ACCEPTED, _HARMLESS, source.path)
    rules = settings.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(rule.startswith("-:") for rule in rules):
        raise refuse(settings, "dynamic", "only rules that leave modules unquantised ('-:...')", source.path)
    if "bits" not in settings:
        raise refuse(settings, "bits", "4 or 8", source.path)
    stems = [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    return [_weight(stem, settings, source) for stem in stems]


def _weight(stem: str, settings: Mapping[str, Any], source: TensorSource) -> StoredWeight:
    bits = settings["bits"]
    num_words, num_rows = words_shape(source, f"{stem}.qweight")
    k_len = num_words * 32 // bits
    group_len = group_size_of(settings, "group_size", k_len, source.path)
    num_groups = -(-k_len // group_len)
    scale = find_part(source, f"{stem}.scales", tuple(DENSE_DTYPES), (num_groups, num_rows))
    find_part(source, f"{stem}.qzeros", ("I32", "U32"), (num_groups, -(-num_rows * bits // 32)))
    parts = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
    group_of = np.arange(k_len) // group_len
    if f"{stem}.g_idx" in source.tensors:
        parts.append(f"{stem}.g_idx")
        find_part(source, f"{stem}.g_idx", ("I32", "I64"), (k_len,))
        stored = source.read(f"{stem}.g_idx")
        if stored.size and not 0 <= stored.min() <= stored.max() < num_groups:
            raise FormatError(
                f"{source.path}: the tensor {stem + '.g_idx'!r} names groups from {stored.min()} to {stored.max()} of"
                f" {num_groups}; the model is damaged: download it again"
            )
        if stored.any():  # all zeros stand for no act-order
            group_of = stored
    has_zeros = not settings.get("sym", True)
    is_v2 = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
    decode = partial(_decode, stem, bits, is_v2, group_of, source)
    shape = num_rows, k_len
    return integer_weight(f"{stem}.weight", shape, bits, group_of, scale.format, has_zeros, parts, decode)


def _decode(stem: str, bits: int, is_v2: bool, group_of: np.ndarray, source: TensorSource) -> TensorValue:
    codes = unpack_words(source.read(f"{stem}.qweight").T, bits)
    words = source.read(f"{stem}.qzeros").astype("<u4")
    if not is_v2:  # stored minus one in every field, with borrow
        words = words + np.uint32(0xFFFFFFFF // ((1 << bits) - 1))
    scale = np.ascontiguousarray(source.read(f"{stem}.scales").T)
    zero = np.ascontiguousarray(unpack_words(words, bits).T[: len(scale)])
    return integer_value(codes, scale, zero, bits, group_of)
