"""Random weights of every format, packed as the kernels read them."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from strop.formats.values import GroupQuantized, TwoLevelScale
from strop.models.packing import pack, packed_bytes, packed_format
from strop.ops.weights import PACKED_FORMATS, Weight


def two_level_scale(rng, n, k, least, most, kind):
    local = rng.integers(least, most, (n, k // 32)).astype(kind)
    return TwoLevelScale((rng.random((n, k // 256)) * 1e-3).astype(np.float16), local)


def quantized(rng, n, k, packed):
    scale = (rng.random((n, k // 32)) * 0.02 + 0.001).astype(np.float16)
    offset = (rng.standard_normal((n, k // 32)) * 0.1).astype(np.float16) if packed.has_offset else None
    if packed.two_level:
        signed = -32, 32, np.int8
        scale = two_level_scale(rng, n, k, *((0, 64, np.uint8) if packed.has_offset else signed))
        offset = two_level_scale(rng, n, k, 0, 64, np.uint8) if packed.has_offset else None
    codes = rng.integers(0, 1 << packed.bits, (n, k)).astype(np.uint8)
    if packed.has_zeros:
        zeros = rng.integers(0, 1 << packed.bits, (n, k // 32)).astype(np.uint8)
        return GroupQuantized(codes, scale, None, zeros, packed.bits)
    return GroupQuantized(codes, scale, offset, packed.zero, packed.bits)


def make(rng, format_name, n, k):
    packed = PACKED_FORMATS[format_name]
    if packed.quantized:
        return quantized(rng, n, k, packed)
    matrix = (rng.standard_normal((n, k)) * 0.05).astype(np.float32)
    return matrix.astype({"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[format_name])


def fitting(format_name, k):
    """The least row length from k on that the format can have."""
    return -(-k // PACKED_FORMATS[format_name].group_len) * PACKED_FORMATS[format_name].group_len


def packed(values, interleave=False):
    name = packed_format(values[0])
    shape = (sum(v.shape[0] for v in values), values[0].shape[1])
    buffer = np.zeros((1, packed_bytes(name, *shape)), np.uint8)
    pack(values, name, buffer[0], interleave=interleave)
    return Weight(jnp.asarray(buffer), name, shape)
