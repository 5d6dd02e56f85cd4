"""A machine whose every figure is round."""

from typing import Any

import msgspec

from strop.machine.profile import VERSION, Curve, Machine, MachineProfile, PageTimes, Sized

MACHINE = Machine("a processor", "avx2", 2, "0123456789abcdef")


def flat(value: float) -> Curve:
    """So much at every point."""
    return Curve((1.0,), (value,))


def rising(per_row: float, least: float, most_rows: int = 512) -> Curve:
    """`least`, or so much per row where that is more."""
    rows = tuple(float(2**i) for i in range(most_rows.bit_length()))
    return Curve(rows, tuple(max(least, per_row * row) for row in rows))


def profile(**changes: Any) -> MachineProfile:
    """Products of 1 ns per weight cold and 0.25 ns warm, until 0.125 ns per row and weight are more; little else."""
    size = Sized(1 << 20, rising(0.125e-9 * 2**20, 1e-9 * 2**20), rising(0.125e-9 * 2**20, 0.25e-9 * 2**20))
    made = MachineProfile(
        version=VERSION,
        machine=MACHINE,
        coarse=False,
        read_bytes_per_s=Curve((2.0**20, 2.0**24, 2.0**26), (2.25e9, 2.25e9, 0.5625e9)),
        linear={"q4": (size,), "f32": (Sized(1 << 20, rising(1e-3, 8e-3), rising(1e-3, 8e-3)),)},
        prepare_s=Curve((1.0,), (1e-12,)),
        call_s=0.0,
        gate_s=0.0,
        attention={
            "bf16": (
                PageTimes(64, rising(0.1e-6, 1e-6, 16), rising(0.1e-6, 0.25e-6, 16)),
                PageTimes(128, rising(0.2e-6, 2e-6, 16), rising(0.2e-6, 0.5e-6, 16)),
            )
        },
        enter_s=0.0,
        embed_s={"q4": 0.0},
        norm_s=0.0,
        greedy_s=0.0,
        sample_s=1e-9,
        step_s=Curve((1.0, 101.0), (100e-6, 200e-6)),
        token_s=1e-6,
    )
    return msgspec.structs.replace(made, **changes)
