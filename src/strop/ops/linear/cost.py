"""Cost of a linear layer."""

from typing import Any

from strop.ops.cost import Cost, weight_kind


def cost(call: Any) -> Cost:
    """2 M N K operations; the matrix is read once, whatever the number of rows."""
    flops = 2 * call.num_rows * call.n_len * call.k_len
    return Cost(weight_kind(call.format), flops, bytes_read=call.weight_bytes)
