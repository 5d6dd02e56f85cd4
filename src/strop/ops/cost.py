"""What an operation costs at least, counted from its recorded call."""

from dataclasses import dataclass
from typing import Literal

from strop.core.config import KvDtype

KV_BYTES: dict[KvDtype, tuple[int, int]] = {"bf16": (2, 0), "int8": (1, 4)}
"""Bytes of a cached number, and of the scale that each token's key and value of a head have."""

Kind = Literal["int8", "bf16", "f32"]
"""Which product instruction serves it: the kinds that strop.machine.probe measures."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Work that no implementation can avoid.

    Bytes are those of stored data: weights, and keys and values of the cache. A step's activations are made and used
    within the processor's caches and are not counted, so a limit computed from a cost is never too low a bar.
    """

    kind: Kind
    flops: int
    """Multiplications and additions of the products; norms, activations and softmax are not counted."""
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_sent: int = 0
    """By each device to others."""


def weight_kind(format: str) -> Kind:
    """The product instruction for weights of this format (strop.ops.weights)."""
    if format.startswith("q"):
        return "int8"
    return "bf16" if format == "bf16" else "f32"
