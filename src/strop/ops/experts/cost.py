"""Cost of a mixture of experts."""

from typing import Any

from strop.ops.cost import Cost, weight_kind


def cost(call: Any, num_chosen: int | None = None) -> Cost:
    """6 T F D operations for each of a row's experts; every expert that some row chose is read once.

    Args:
        num_chosen: how many experts that are; by default the least there can be, those of one row.
    """
    flops = 6 * call.num_rows * call.num_active * call.ffn_dim * call.model_dim
    num_chosen = call.num_active if num_chosen is None else num_chosen
    return Cost(weight_kind(call.format), flops, bytes_read=num_chosen * call.expert_bytes)
