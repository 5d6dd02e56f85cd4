"""Measures what this machine's kernels take: real operations on made-up numbers, through the path of an engine's step.

Points are measured in turn, round after round, so that a busy half minute spoils a round of all of them and not all
rounds of one.
"""

import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from strop.core.errors import UnsupportedError
from strop.formats.pack_cache import cache_directory
from strop.machine.cores import OtherWork, usable_cores
from strop.machine.probe import read_bandwidth_bytes_per_s
from strop.machine.profile import (
    VERSION,
    Curve,
    Machine,
    MachineProfile,
    read_profile,
    this_machine,
    write_profile,
)
from strop.ops import native
from strop.ops.weights import PACKED_FORMATS
from strop.plan.kernel_points import Extent, KernelPoints
from strop.plan.overhead import measure_overhead

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MOST_OTHER_WORK = 0.1
"""Of the processors' time, while they are measured."""

# Rows are computed in blocks of up to 12, so that 13 take more than 13/12 of 12.
_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 13, 16, 24, 25, 48, 64, 128, 512)
FULL = Extent(
    seconds=20.0,
    formats=tuple(PACKED_FORMATS),
    products={512: _ROWS, 1024: _ROWS, 2048: _ROWS, 4096: (1, 4, 6, 8, 10, 12, 16, 64)},
    page_rows=(1, 2, 3, 4, 6, 7, 8, 10, 12),
    head_dims=(64, 128),
    kv_dtypes=("bf16", "int8"),
    bandwidth_bytes=tuple(1 << power for power in range(20, 29)),
    batches=(1, 4, 16, 64),
)
COARSE = Extent(
    seconds=1.5,
    formats=("q4", "q8", "bf16"),
    products={512: (1, 2, 4, 8, 12, 24, 64, 256), 2048: (1, 2, 4, 8, 12, 24, 64, 256), 4096: (1, 4, 8, 12, 64)},
    page_rows=(1, 4, 8, 12),
    head_dims=(64, 128),
    kv_dtypes=("bf16",),
    bandwidth_bytes=(1 << 21, 1 << 23, 1 << 25, 1 << 26, 1 << 27, 1 << 28),
    batches=(1, 32),
)


class Calibration:
    """Measures this machine's kernels in rounds, which may lie minutes apart.

    The native kernels must be registered, and their pool have `machine.num_threads`. Of one thread, `clock` may be
    time.thread_time: what other processes take does not count then.
    """

    def __init__(
        self, library: ctypes.CDLL, machine: Machine, extent: Extent = FULL, clock: Clock = time.perf_counter
    ) -> None:
        self._machine, self._extent = machine, extent
        self._points = KernelPoints(library, extent, machine.num_threads)
        self._bandwidth = [
            read_bandwidth_bytes_per_s(size, machine.num_threads, extent.seconds / 100)
            for size in extent.bandwidth_bytes
        ]
        self._rounds = Rounds(dict(self._points.points()), clock)
        self._overhead = measure_overhead(self._points.memory, extent.batches)

    def run(self, seconds: float, least_rounds: int = 1) -> None:
        """Rounds over all points for about so long."""
        self._rounds.run(seconds, least_rounds)

    def profile(self) -> MachineProfile:
        """By all rounds so far."""
        reads = Curve(tuple(map(float, self._extent.bandwidth_bytes)), tuple(self._bandwidth))
        return MachineProfile(
            version=VERSION,
            machine=self._machine,
            coarse=self._extent is not FULL,
            read_bytes_per_s=reads,
            step_s=self._overhead.step_s,
            token_s=self._overhead.token_s,
            **self._points.figures(self._rounds.seconds()),
        )


def calibrate(library: ctypes.CDLL, machine: Machine, extent: Extent = FULL) -> MachineProfile:
    """The profile of this machine, in about two times `extent.seconds`."""
    calibration = Calibration(library, machine, extent)
    calibration.run(extent.seconds, least_rounds=3)
    return calibration.profile()


def machine_profile(num_threads: int = 0, *, fresh: bool = False) -> MachineProfile:
    """This machine's stored profile; without one, a coarse one that takes some five seconds.

    That is stored, too, unless other work took part of the processors meanwhile.

    Args:
        num_threads: 0 means the usable cores.
        fresh: measure the whole profile, for less than a minute, and store it.

    Raises:
        UnsupportedError: there are no native kernels to measure.
        FormatError: the stored file is damaged.
    """
    library, path = native.library(), native.library_path()
    if library is None or path is None or not native.register():
        cure = "install with a C++ compiler, on x86-64 with AVX2"
        if os.environ.get("STROP_NATIVE") == "0":
            cure = "unset STROP_NATIVE, which hides them"
        raise UnsupportedError(f"there are no native kernels to measure: {cure}")
    num_threads = num_threads or usable_cores()
    machine = this_machine(native.isa() or "", num_threads, path)
    directory = cache_directory()
    native.set_num_threads(num_threads)
    stored = None if fresh else read_profile(directory, machine)
    if stored is not None:
        return stored
    if not fresh:
        log.warning("measuring this machine for some seconds, once; `strop plan --calibrate` does it better")
    others = OtherWork()
    profile = calibrate(library, machine, FULL if fresh else COARSE)
    if (share := others.share()) > MOST_OTHER_WORK:
        kept = "kept all the same" if fresh else "not kept"
        log.warning(
            "other work took %.0f %% of the processors: what was measured is too slow, and %s", 100 * share, kept
        )
    if fresh:
        write_profile(directory, profile)
    elif share <= MOST_OTHER_WORK:
        with suppress(OSError):  # it is measured again next time
            write_profile(directory, profile)
    return profile


class Rounds:
    """Times things to run in turn, round after round: a neighbour's busy minute spoils a round of all of them."""

    def __init__(self, points: dict[Any, Callable[[], object]], clock: Clock = time.perf_counter) -> None:
        """Runs each once, which may compile."""
        for run in points.values():
            run()
        self._points, self._clock = points, clock
        self._found: dict[Any, list[float]] = {name: [] for name in points}

    def run(self, seconds: float, least_rounds: int = 1) -> None:
        """For about so long."""
        end = time.perf_counter() + seconds
        num_rounds = 0
        while num_rounds < least_rounds or time.perf_counter() < end:
            for name, run in self._points.items():
                begin = self._clock()
                run()
                self._found[name].append(self._clock() - begin)
            num_rounds += 1

    def seconds(self) -> dict[Any, float]:
        """Of each, by all rounds."""
        return {name: typical(times) for name, times in self._found.items()}


def typical(times: Sequence[float]) -> float:
    """What a third of them do not exceed: neighbours only ever add time, and then several times over."""
    return sorted(times)[(len(times) - 1) // 3]
