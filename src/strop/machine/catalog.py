"""Hardware as data: peaks, memory and links of a device, from hardware/*.toml or a user's own file.

Every figure of a file has its unit in its key and, under [sources], where it comes from.
"""

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from strop.core.errors import FormatError, RequestError

HARDWARE = Path(__file__).parent / "hardware"
MAX_FILE_BYTES = 64 << 10
MAX_DEVICES = 1 << 20

THIS = "this-machine"
"""What this machine is called where hardware is asked for (strop.plan.local)."""

Topology = Literal["torus", "switch", "none"]
_TOPOLOGIES = ("torus", "switch", "none")
_PEAK_KEY = re.compile(r"peak_([a-z0-9]+)_flops_per_s")
_FIGURES = {  # key -> (least, most), with both within
    "memory_bytes": (1 << 20, 1e16),
    "memory_bytes_per_s": (1e6, 1e16),
    "link_bytes_per_s": (1e3, 1e16),
    "num_torus_axes": (1, 3),
    "ring_axis_multiple": (1, 1 << 10),
    "max_devices": (1, MAX_DEVICES),
    "usd_per_device_hour": (0, 1e6),
}
_PEAK_RANGE = (1e6, 1e18)
_INTEGERS = {"memory_bytes", "num_torus_axes", "ring_axis_multiple", "max_devices"}
_REQUIRED = ("title", "memory_bytes", "memory_bytes_per_s", "topology", "sources")
_OPTIONAL = ("aliases", "price_date")


@dataclass(frozen=True, slots=True)
class Device:
    """One chip, card or socket."""

    name: str
    title: str
    aliases: tuple[str, ...]
    peak_flops_per_s: dict[str, float]
    """By the type of the numbers multiplied (bf16, int8, fp8, f32), without sparsity; additions count."""
    memory_bytes: int
    memory_bytes_per_s: float
    topology: Topology
    link_bytes_per_s: float
    """One direction: of one of two links per torus axis, or of all that a device has to its switch. 0: no link."""
    num_torus_axes: int
    ring_axis_multiple: int
    """The axes of a slice of the torus close to rings if each is a multiple of this; else it is an open mesh."""
    max_devices: int
    usd_per_device_hour: float | None
    price_date: str
    sources: dict[str, str]

    def peak(self, dtype: str) -> float:
        """FLOPs per second of products of this type. Raises RequestError if the file has none for it."""
        if dtype not in self.peak_flops_per_s:
            raise RequestError(
                f"{self.name} has no peak for {dtype!r}; it has {', '.join(self.peak_flops_per_s)}: "
                "take another type, or a hardware file that gives it"
            )
        return self.peak_flops_per_s[dtype]

    @property
    def all_links_bytes_per_s(self) -> float:
        """What a device sends at most, all links in one direction together."""
        return self.link_bytes_per_s * (2 * self.num_torus_axes if self.topology == "torus" else 1)

    def axis_closes(self, mesh: tuple[int, ...]) -> bool:
        """Whether the axes of a mesh of this shape are rings, so that collectives go both ways round."""
        return self.topology == "torus" and all(length % self.ring_axis_multiple == 0 for length in mesh if length > 1)


class Machines(NamedTuple):
    """So many devices of a kind."""

    device: Device
    num_devices: int


@cache
def devices() -> dict[str, Device]:
    """All devices of the catalog, by name."""
    return {path.stem: read_device(path) for path in sorted(HARDWARE.glob("*.toml"))}


@cache
def _names() -> dict[str, str]:
    """Each name and alias -> the name."""
    return {name: device.name for device in devices().values() for name in (*device.aliases, device.name)}


def find_machines(text: str) -> Machines:
    """What `h200`, `h200x8`, `tpu-v4x64` or `my-device.tomlx2` stands for: a name of the catalog or a file, times N.

    Raises:
        RequestError: no such name (the nearest are listed), or a count that the device's links do not reach.
        FormatError: the file is not a description of hardware.
    """
    name, count = text.strip(), 1
    if not _is_known(name) and (match := re.fullmatch(r"(.+?)x(\d{1,9})", name)):
        name, count = match[1], int(match[2])
    if name.endswith(".toml"):
        device = read_device(Path(name))
    elif name.lower() in _names():
        device = devices()[_names()[name.lower()]]
    else:
        near = difflib.get_close_matches(name.lower(), _names(), n=3, cutoff=0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise RequestError(
            f"no hardware is called {name!r:.80}{hint}: known are {THIS}, {', '.join(devices())}, each "
            "of these with xN for N of them, or a file.toml of your own"
        )
    if not 1 <= count <= device.max_devices:
        raise RequestError(
            f"{text!r:.80} asks for {count} devices; {device.name} is linked in groups of 1 to {device.max_devices}: "
            "plan for one group, and run several"
        )
    return Machines(device, count)


def _is_known(name: str) -> bool:
    return name.lower() in _names() or name.endswith(".toml")


def read_device(path: Path) -> Device:
    """Reads and checks one file.

    Raises:
        RequestError: there is no such file.
        FormatError: it is no TOML, has an unknown key or lacks one, a value out of range, or a figure without a source.
    """
    values = _read_toml(path)

    def refuse(problem: str) -> FormatError:
        return FormatError(f"{path.name}: {problem}")

    _check_keys(values, refuse)
    figures: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for key, value in values.items():
        peak = _PEAK_KEY.fullmatch(key)
        if key not in _FIGURES and not peak:
            continue
        low, high = _PEAK_RANGE if peak else _FIGURES[key]
        kinds = int if key in _INTEGERS else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "an integer" if key in _INTEGERS else "a number"
            raise refuse(f"{key}={value!r:.80} is not {kind} from {low:g} to {high:g}: give it in the key's unit")
        if peak:
            peaks[peak[1]] = float(value)
        else:
            figures[key] = value
    if not peaks:
        raise refuse("no peak: give peak_bf16_flops_per_s, or another type's")
    topology = values["topology"]
    if topology not in _TOPOLOGIES:
        raise refuse(f"topology={topology!r:.80} is not one of {', '.join(_TOPOLOGIES)}")
    needed = {"torus": ("link_bytes_per_s", "num_torus_axes"), "switch": ("link_bytes_per_s",), "none": ()}[topology]
    for key in needed:
        if key not in figures:
            raise refuse(f"lacks {key}, which topology={topology!r} needs")
    sources = values["sources"]
    for key in (*figures, *(f"peak_{kind}_flops_per_s" for kind in peaks)):
        if key != "num_torus_axes" and not (isinstance(sources.get(key), str) and sources[key].strip()):
            raise refuse(f"{key} has no source: say under [sources] where it comes from")
    return Device(
        name=path.stem,
        title=values["title"],
        aliases=tuple(map(str, values.get("aliases", ()))),
        peak_flops_per_s=peaks,
        memory_bytes=int(figures["memory_bytes"]),
        memory_bytes_per_s=float(figures["memory_bytes_per_s"]),
        topology=topology,
        link_bytes_per_s=float(figures.get("link_bytes_per_s", 0.0)),
        num_torus_axes=int(figures.get("num_torus_axes", 0)),
        ring_axis_multiple=int(figures.get("ring_axis_multiple", 1)),
        max_devices=int(figures.get("max_devices", MAX_DEVICES if topology != "none" else 1)),
        usd_per_device_hour=figures.get("usd_per_device_hour"),
        price_date=values.get("price_date", ""),
        sources=dict(sources),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot read the hardware file {str(path)!r}: {error.strerror}: check its path") from None
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"{path.name}: over {MAX_FILE_BYTES} bytes: this is no description of hardware")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path.name}: not TOML ({error}): compare it with one of Strop's hardware files") from None


def _check_keys(values: dict[str, Any], refuse: Callable[[str], FormatError]) -> None:
    known = (*_REQUIRED, *_FIGURES, *_OPTIONAL)
    for key in values:
        if key not in known and not _PEAK_KEY.fullmatch(key):
            near = difflib.get_close_matches(key, (*known, "peak_bf16_flops_per_s"), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise refuse(f"unknown key {key!r:.80}{hint}")
    for key in _REQUIRED:
        if key not in values:
            raise refuse(f"lacks {key}; every file has {', '.join(_REQUIRED)}")
    for key, kind in (("title", str), ("price_date", str), ("aliases", list), ("sources", dict)):
        if not isinstance(values.get(key, kind()), kind):
            raise refuse(f"{key}={values[key]!r:.80} is not {'a table' if kind is dict else f'a {kind.__name__}'}")
    if "usd_per_device_hour" in values and not values.get("price_date"):
        raise refuse("usd_per_device_hour has no price_date: prices change, so say when it held")
