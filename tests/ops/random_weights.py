"""Random weights of every format, packed as the kernels read them."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from strop.formats.values import GroupQuantized
from strop.models.packing import pack, packed_bytes, packed_format
from strop.ops.weights import Weight


def quantized(rng, n, k, bits, zero, has_offset):
    scale = (rng.random((n, k // 32)) * 0.02 + 0.001).astype(np.float16)
    offset = (rng.standard_normal((n, k // 32)) * 0.1).astype(np.float16) if has_offset else None
    return GroupQuantized(rng.integers(0, 1 << bits, (n, k)).astype(np.uint8), scale, offset, zero, bits)


def with_zeros(rng, n, k, bits):
    value = quantized(rng, n, k, bits, 0, False)
    return replace(value, zero=rng.integers(0, 1 << bits, (n, k // 32)).astype(np.uint8))


def make(rng, format_name, n, k):
    matrix = (rng.standard_normal((n, k)) * 0.05).astype(np.float32)
    return {
        "q4": lambda: quantized(rng, n, k, 4, 8, False),
        "q4_offset": lambda: quantized(rng, n, k, 4, 0, True),
        "q8": lambda: quantized(rng, n, k, 8, 128, False),
        "q8_zero16": lambda: quantized(rng, n, k, 5, 16, False),
        "q8_offset": lambda: quantized(rng, n, k, 5, 0, True),
        "q4_zeros": lambda: with_zeros(rng, n, k, 4),
        "q8_zeros": lambda: with_zeros(rng, n, k, 8),
        "bf16": lambda: matrix.astype(ml_dtypes.bfloat16),
        "f16": lambda: matrix.astype(np.float16),
        "f32": lambda: matrix,
    }[format_name]()


def packed(values, interleave=False):
    name = packed_format(values[0])
    shape = (sum(v.shape[0] for v in values), values[0].shape[1])
    buffer = np.zeros((1, packed_bytes(name, *shape)), np.uint8)
    pack(values, buffer[0], interleave=interleave)
    return Weight(jnp.asarray(buffer), name, shape)
