"""Where a network runs: the platform of its operations, and (later) the points where activations are gathered."""

from dataclasses import dataclass

from strop.core.config import KvDtype
from strop.ops.dispatch import Platform


@dataclass(frozen=True, slots=True)
class Single:
    """Everything on one device."""

    platform: Platform
    block_len: int = 32
    kv_dtype: KvDtype = "bf16"
