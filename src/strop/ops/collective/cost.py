"""Cost of a collective."""

from typing import Any

from strop.ops.cost import Cost


def cost(call: Any) -> Cost:
    """Bytes that each device sends, which is also what each receives: with K devices, (K - 1) / K of what it holds
    after an all-gather, or before a reduce-scatter or an all-to-all; twice that for an all-reduce, which is a
    reduce-scatter and an all-gather (Pope et al. 2022, appendix A.1)."""
    others = call.num_devices - 1
    match call.kind:
        case "all_gather":
            sent = call.num_bytes * others
        case "all_reduce":
            sent = -(-2 * call.num_bytes * others // call.num_devices)
        case _:
            sent = call.num_bytes * others // call.num_devices
    return Cost("f32", 0, bytes_sent=sent)
