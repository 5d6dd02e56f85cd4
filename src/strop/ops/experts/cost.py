"""Cost of a mixture of experts."""

from typing import Any

from strop.ops.cost import Cost, weight_kind


def cost(call: Any) -> Cost:
    """Three products for each expert that a row chose; an expert is read once, and no more than rows can choose."""
    flops = 2 * call.num_rows * call.num_active * 3 * call.ffn_dim * call.model_dim
    num_read = min(call.num_experts, call.num_rows * call.num_active)
    return Cost(weight_kind(call.format), flops, bytes_read=num_read * call.expert_bytes)
