"""Cost of attention."""

from typing import Any

from strop.ops.cost import Cost


def cost(call: Any, visible_slots: int, read_slots: int, item_bytes: int = 2, scale_bytes: int = 0) -> Cost:
    """Scores and weighted sums over what the rows see; keys and values of all sequences read once, new ones written.

    Args:
        visible_slots: slots each row sees, summed over the rows.
        read_slots: slots that some row sees, summed over the sequences (rows of one sequence share them).
        item_bytes: of one cached number.
        scale_bytes: of the scale of one cached key or value.
    """
    slot_bytes = 2 * call.num_kv_heads * (call.head_dim * item_bytes + scale_bytes)
    return Cost(
        "bf16",
        4 * call.num_heads * call.head_dim * visible_slots,
        bytes_read=read_slots * slot_bytes,
        bytes_written=call.num_rows * slot_bytes,
    )
