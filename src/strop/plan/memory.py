"""What a device of a mesh holds: weights, and keys and values by how attention is sharded (Pope et al. 2022, 3.3)."""

import math

from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.params import inventory
from strop.models.spec import ModelSpec

ITEM_BYTES = {"int8": 1, "fp8": 1, "bf16": 2, "f16": 2, "f32": 4}


def weight_bytes_per_device(spec: ModelSpec, mesh: MeshShape, dtype: str) -> float:
    """Matrices, spread evenly over the mesh; vectors are left out."""
    return (
        ITEM_BYTES[dtype]
        * sum(math.prod(info.shape) for info in inventory(spec).values() if len(info.shape) > 1)
        / mesh.size()
    )


def kv_bytes_per_token(spec: ModelSpec, sharding: AttentionSharding, mesh: MeshShape, kv_dtype: str = "bf16") -> float:
    """Bytes that one token of context of each of B sequences takes on a device, per sequence.

    Sharded over heads, a device has all sequences and its share of the key and value heads, at least one whole head: a
    single head (multiquery) is replicated on every device. Sharded over the batch, it has all heads of 1/n of the
    sequences.
    """
    devices = mesh.size()
    num_bytes = 0.0
    for layer in spec.layers:
        attention = layer.attention
        heads = math.ceil(attention.num_kv_heads / devices) if sharding == "heads" else attention.num_kv_heads / devices
        num_bytes += 2 * heads * attention.head_dim * ITEM_BYTES[kv_dtype]
    return num_bytes


def longest_context(
    spec: ModelSpec,
    sharding: AttentionSharding,
    mesh: MeshShape,
    batch: int,
    cache_bytes_per_device: float,
    kv_dtype: str = "bf16",
) -> float:
    """Tokens of context that each of `batch` sequences can have in that much memory of every device (Table 1)."""
    return cache_bytes_per_device / (kv_bytes_per_token(spec, sharding, mesh, kv_dtype) * batch)
