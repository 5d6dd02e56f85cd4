"""What this machine can do at most, measured: the ceiling that a step's time is compared with.

The limit of a step is max(FLOPs / matrix rate, bytes / bandwidth), so a probe that is too low shows as a share above
100 %, and a probe that is too high only makes us look slow.
"""

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from strop.machine.cores import usable_cores

ProductKind = Literal["int8", "bf16", "f32"]
PRODUCT_KINDS: tuple[ProductKind, ...] = ("int8", "bf16", "f32")
MOST_PROBED_BYTES = 256 << 20
"""Beyond most caches: a larger set reads no faster, and a probe beside a loaded model must not double its memory."""
_BANDWIDTH_ARGUMENTS = (ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_int32)


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Peaks of `num_threads` threads on instruction set `isa`; bandwidths at `working_set_bytes`."""

    isa: str
    num_threads: int
    working_set_bytes: int
    flops_per_s: dict[ProductKind, float]
    """Multiplications and additions on registers, by the product instruction a linear of that kind uses."""
    read_bytes_per_s: float
    """Sweeping the working set in pages of 4 KiB."""
    read_huge_bytes_per_s: float
    """The same in pages of 2 MiB, where the system grants them."""

    @property
    def best_read_bytes_per_s(self) -> float:
        """The faster kind of pages: what the weights could be read at, wherever they lie."""
        return max(self.read_bytes_per_s, self.read_huge_bytes_per_s)

    def limit_s(self, flops: dict[ProductKind, float], num_bytes: float) -> float:
        """Least seconds for these FLOPs, kind by kind, and this many bytes from memory, both at once."""
        compute_s = sum(count / self.flops_per_s[kind] for kind, count in flops.items())
        return max(compute_s, num_bytes / self.best_read_bytes_per_s)

    def better_of(self, other: "MachineRates") -> "MachineRates":
        """Figure by figure the higher one: a probe beside a busy neighbour says too little, never too much."""
        return MachineRates(
            self.isa,
            self.num_threads,
            self.working_set_bytes,
            {kind: max(self.flops_per_s[kind], other.flops_per_s[kind]) for kind in self.flops_per_s},
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.read_huge_bytes_per_s, other.read_huge_bytes_per_s),
        )


def probe(library: ctypes.CDLL, working_set_bytes: int, num_threads: int, seconds: float = 3.0) -> MachineRates:
    """Measures `library`'s (strop.ops.native) instruction set for about `seconds` in all.

    Raises:
        ValueError: the working set or the number of threads is not positive.
    """
    if working_set_bytes < 1 or num_threads < 1:
        raise ValueError(f"nothing to probe: {working_set_bytes=} and {num_threads=} must be 1 or more")
    rate, bandwidth = library.strop_probe_rate, library.strop_probe_bandwidth
    rate.restype = bandwidth.restype = ctypes.c_double
    rate.argtypes = (ctypes.c_int32, ctypes.c_int32, ctypes.c_double)
    bandwidth.argtypes = _BANDWIDTH_ARGUMENTS
    library.strop_isa.restype = ctypes.c_char_p
    each_s = seconds / (len(PRODUCT_KINDS) + 2)
    flops_per_s = {kind: rate(code, num_threads, each_s) for code, kind in enumerate(PRODUCT_KINDS)}
    small, huge = (bandwidth(working_set_bytes, num_threads, each_s, huge) for huge in (0, 1))
    return MachineRates(library.strop_isa().decode(), num_threads, working_set_bytes, flops_per_s, small, huge)


def read_bandwidth_bytes_per_s(working_set_bytes: int, num_threads: int = 0, seconds: float = 0.2) -> float:
    """Bytes per second read at this working set, by the faster kind of pages; `num_threads=0` means the usable cores.

    Of a larger one only MOST_PROBED_BYTES. Without the native library numpy reads them, on one thread.
    """
    working_set_bytes = min(working_set_bytes, MOST_PROBED_BYTES)
    path = Path(__file__).parents[1] / "ops" / "libstrop_native.so"
    if os.environ.get("STROP_NATIVE") != "0" and path.exists():
        bandwidth = ctypes.CDLL(str(path)).strop_probe_bandwidth
        bandwidth.restype, bandwidth.argtypes = ctypes.c_double, _BANDWIDTH_ARGUMENTS
        threads = num_threads or usable_cores()
        best = max(bandwidth(working_set_bytes, threads, seconds / 2, huge) for huge in (0, 1))
        if best > 0:
            return float(best)
    words = np.ones(max(1, working_set_bytes // 8), np.uint64)
    best_s, end = float("inf"), time.perf_counter() + seconds
    while best_s == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        words.max()
        best_s = min(best_s, time.perf_counter() - begin)
    return words.nbytes / best_s


class KernelClock:
    """Seconds spent inside the native kernels since it was made or last read; what is left of a step is overhead."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._read = library.strop_kernel_ns
        self._read.restype = ctypes.c_int64
        self._last_ns = self._read()

    def lap_s(self) -> float:
        """Seconds since the last reading."""
        now_ns = self._read()
        last_ns, self._last_ns = self._last_ns, now_ns
        return float(now_ns - last_ns) * 1e-9
