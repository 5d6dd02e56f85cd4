"""What this machine's kernels take, measured once and kept: the figures that strop.plan.predict adds up. No jax."""

import hashlib
import json
import math
import os
import platform
import tempfile
from bisect import bisect_right
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import msgspec

from strop.core.config import KvDtype
from strop.core.errors import FormatError

VERSION = 1
"""Raise when the figures' meaning changes, so that old files are ignored."""

_MOST_POINTS = 256
_MOST_FILE_BYTES = 1 << 20


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A positive quantity at ascending points, and straight lines between them."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.x) == len(self.y) <= _MOST_POINTS:
            raise ValueError(f"{len(self.x)} points with {len(self.y)} values: as many of each, 1 to {_MOST_POINTS}")
        if not all(a < b for a, b in pairwise(self.x)):
            raise ValueError("points that do not ascend")
        if not all(0 < value < math.inf for value in (*self.x, *self.y)):
            raise ValueError("a point or value that is not a finite number above 0")

    def at(self, x: float) -> float:
        """The nearest end's value outside of the points."""
        right = bisect_right(self.x, x)
        if right in (0, len(self.x)):
            return self.y[max(right - 1, 0)]
        begin, end = self.x[right - 1], self.x[right]
        return self.y[right - 1] + (self.y[right] - self.y[right - 1]) * (x - begin) / (end - begin)

    def growing(self, x: float) -> float:
        """Beyond the last point it grows in proportion."""
        return self.at(x) * max(1.0, x / self.x[-1])


class Sized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of products with a matrix of so many weights: seconds by rows."""

    num_weights: int
    cold: Curve
    """Weights from memory."""
    warm: Curve
    """Weights that a cache holds."""


class PageTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a sweep over a page of keys and values of one head: seconds, by the rows that share it."""

    head_dim: int
    cold: Curve
    warm: Curve


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What figures hold for."""

    cpu: str
    isa: str
    num_threads: int
    library: str
    """Of the native library, the beginning of its SHA-256."""


class MachineProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of `machine.num_threads` threads together, of many short runs."""

    version: int
    machine: Machine
    coarse: bool
    """From a probe of seconds: fewer points, more of them inferred."""
    read_bytes_per_s: Curve
    """By bytes of the working set."""
    linear: dict[str, tuple[Sized, ...]]
    """By weight format, then by ascending size."""
    prepare_s: Curve
    """What a linear does with its input first, per number of a row, by rows."""
    call_s: float
    """Of a linear without work to speak of, and so of any operation."""
    gate_s: float
    """Per output of a gated linear, above one without gate."""
    attention: dict[KvDtype, tuple[PageTimes, ...]]
    """By ascending head_dim."""
    enter_s: float
    """Per number of queries, keys and values: rotation and the write into the cache."""
    embed_s: dict[str, float]
    """Per number of a looked-up row, by format."""
    norm_s: float
    """Per number of a norm by itself."""
    greedy_s: float
    """Per logit."""
    sample_s: float
    """Per logit, of sampling with a temperature."""
    step_s: Curve
    """Of a step outside the kernels, by sequences."""
    token_s: float
    """The same per token of a prompt."""

    def __post_init__(self) -> None:
        numbers = (self.call_s, self.gate_s, self.enter_s, self.norm_s, self.greedy_s, self.sample_s)
        if not all(0 <= value < math.inf for value in (*numbers, self.token_s, *self.embed_s.values())):
            raise ValueError("a time that is not a finite number, 0 or more")
        tables = (*self.linear.values(), *self.attention.values())
        if not self.linear or not self.embed_s or "bf16" not in self.attention or not all(tables):
            raise ValueError("a table without entries")
        for sizes in self.linear.values():
            if not all(0 < a.num_weights < b.num_weights for a, b in pairwise(sizes)):
                raise ValueError("matrices that do not grow")
        for pages in self.attention.values():
            if not all(0 < a.head_dim < b.head_dim for a, b in pairwise(pages)):
                raise ValueError("heads that do not ascend")

    def coldness(self, working_set_bytes: float) -> float:
        """How much of a step's data comes from memory, 0 to 1, where the step goes through so many bytes."""
        curve = self.read_bytes_per_s
        fast, slow = 1 / max(curve.y), 1 / curve.y[-1]
        if slow <= fast:
            return 1.0
        logs = Curve(tuple(map(math.log2, curve.x)), curve.y)
        return min(1.0, max(0.0, (1 / logs.at(math.log2(max(2.0, working_set_bytes))) - fast) / (slow - fast)))


def this_machine(isa: str, num_threads: int, library: Path) -> Machine:
    """What figures measured now hold for."""
    return Machine(_cpu_name(), isa, num_threads, hashlib.sha256(library.read_bytes()).hexdigest()[:16])


def _cpu_name(root: Path = Path("/")) -> str:
    with suppress(OSError):
        fields: dict[str, str] = {}
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        names = ("model name", "cpu family", "model", "stepping")
        if found := " ".join(fields[name] for name in names if name in fields):
            return found
    return platform.processor() or platform.machine()


def profile_path(directory: Path, machine: Machine) -> Path:
    """Where the figures of a machine are kept."""
    key = hashlib.sha256(msgspec.json.encode(machine)).hexdigest()[:16]
    return directory / "profiles" / f"{key}.json"


def read_profile(directory: Path, machine: Machine) -> MachineProfile | None:
    """The stored figures of this machine; None if there are none, or those of another version of Strop.

    Raises:
        FormatError: the file is damaged.
    """
    path = profile_path(directory, machine)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): delete it and calibrate again") from error
    try:
        if len(content) > _MOST_FILE_BYTES:
            raise ValueError(f"more than {_MOST_FILE_BYTES} bytes")
        if msgspec.json.decode(content, type=dict).get("version") != VERSION:
            return None
        found = msgspec.json.decode(content, type=MachineProfile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no profile of a machine ({error}): delete it and calibrate again") from error
    return found if found.machine == machine else None


def write_profile(directory: Path, profile: MachineProfile) -> Path:
    """Stores the figures, in place of earlier ones. Raises OSError where that cannot be."""
    path = profile_path(directory, profile.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(msgspec.to_builtins(profile), indent=1)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
