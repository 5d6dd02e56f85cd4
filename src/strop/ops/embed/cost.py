"""Cost of a row lookup."""

from typing import Any

from strop.ops.cost import Cost, weight_kind
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS


def cost(call: Any) -> Cost:
    """No products; one row of the table per token."""
    packed = PACKED_FORMATS.get(call.format)
    row_bytes = packed.tile_bytes(call.model_dim) // TILE_COLUMNS if packed else 4 * call.model_dim
    return Cost(weight_kind(call.format), 0, bytes_read=call.num_rows * row_bytes)
