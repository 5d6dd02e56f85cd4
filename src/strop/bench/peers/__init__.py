"""Other engines, as contenders: which are installed, and with which flags each is at its best."""

import itertools
import json
import logging
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from strop.bench.workloads import Workload
from strop.core.errors import StropError

log = logging.getLogger(__name__)

Flags = dict[str, Any]
_SEARCH_ROUNDS = 2


class TopLogprobs(NamedTuple):
    """What an engine that keeps its logits to itself still tells: its most probable tokens at every position."""

    token_ids: np.ndarray
    """int32 [T, k]"""
    logprobs: np.ndarray
    """float32 [T, k]"""


class Adapter(Protocol):
    """One engine with one set of weights."""

    def describe(self) -> dict[str, str]:
        """`version` and `isa`, in the engine's own words."""
        ...

    def measure(self, workload: Workload, flags: Flags) -> float:
        """The workload's value with these flags. StropError when it cannot."""
        ...

    def logits(self, windows: np.ndarray, *, one_by_one: bool) -> Iterator[np.ndarray | TopLogprobs]:
        """Per window int32 [T]: logits float32 [T, V], or what the engine tells of them. StropError when it cannot."""
        ...

    def close(self) -> None:
        """Ends any process it keeps."""
        ...


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One peer as peers.toml states it, paths resolved."""

    name: str
    engine: str
    adapter: str
    module: str
    programs: Path
    weights: Path | None
    """None: to be made by quantising the model file to `quantize`."""
    quantize: str
    rows: frozenset[str] | None
    flags: dict[str, dict[str, list[Any]]]
    environment: dict[str, str]
    pinned_version: str
    start_repeats: int | None

    def serves(self, row: str) -> bool:
        """Whether the peer takes part in a row."""
        return self.rows is None or row in self.rows

    def candidates(self, row: str) -> list[Flags]:
        """Every combination of the flags worth trying; a row without flags of its own has those of decode."""
        choices = self.flags.get(row, self.flags["decode"])
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def default_directory() -> Path:
    """`$STROP_PEERS`, else `~/.cache/strop/peers`."""
    return Path(os.environ.get("STROP_PEERS") or "~/.cache/strop/peers").expanduser()


def find_peers(engines: list[str], directory: Path, model_file: Path) -> list[PeerSpec]:
    """The peers of the asked engines.

    Raises:
        StropError: an engine is unknown or not installed; the message says how to install it.
    """
    table = _merged(
        tomllib.loads(resources.files(__package__).joinpath("peers.toml").read_text()), directory / "peers.toml"
    )
    specs = []
    for engine_name in engines:
        if engine_name not in table["engine"]:
            raise StropError(f"--against {engine_name!r} is unknown: choose from {', '.join(table['engine'])}")
        engine = table["engine"][engine_name]
        programs = Path(os.environ.get(engine["environment_variable"]) or directory / engine["programs"])
        if not programs.is_dir():
            raise StropError(
                f"{engine_name} is not installed: no directory {programs} (set ${engine['environment_variable']} or "
                f"--peers). To install it, with DIR={directory}:{engine['install']}"
            )
        for peer in table["peer"]:
            if peer["engine"] == engine_name:
                specs.append(_spec(peer, engine, programs, directory, model_file))
    present = [spec for spec in specs if spec.weights is None or spec.weights.exists()]
    for spec in specs:
        if spec not in present:
            log.warning("%s is left out: its weights %s are missing", spec.name, spec.weights)
    return present


def _spec(peer: dict[str, Any], engine: dict[str, Any], programs: Path, directory: Path, model_file: Path) -> PeerSpec:
    weights = peer.get("weights", "").format(model=model_file.name.split(".")[0], file=model_file.resolve())
    return PeerSpec(
        peer["name"],
        peer["engine"],
        engine["adapter"],
        engine.get("module", ""),
        programs,
        directory / weights if weights else None,
        peer.get("quantize", ""),
        frozenset(peer["rows"]) if "rows" in peer else None,
        engine["flags"],
        engine.get("environment", {}),
        engine["version"],
        engine.get("start_repeats"),
    )


def _merged(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The shipped table with a user's file laid over it."""
    if not path.exists():
        return table
    try:
        over = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise StropError(f"{path} is not valid TOML: {error}") from error
    for name, engine in over.get("engine", {}).items():
        table["engine"].setdefault(name, {}).update(engine)
    by_name = {peer["name"]: peer for peer in table["peer"]}
    for peer in over.get("peer", []):
        if peer.get("name") in by_name:
            by_name[peer["name"]].update(peer)
        else:
            table["peer"].append(peer)
    return table


def make_adapter(spec: PeerSpec, model_file: Path, num_threads: int, cache: Path) -> Adapter:
    """The adapter that peers.toml names."""
    if spec.adapter == "llama_cpp":
        from strop.bench.peers.llama_cpp import LlamaCpp

        return LlamaCpp(spec, model_file, num_threads, cache)
    from strop.bench.peers.worker import WorkerPeer

    return WorkerPeer(spec, num_threads)


@dataclass
class Peer:
    """A contender that runs each workload with the flags that were fastest here."""

    spec: PeerSpec
    adapter: Adapter
    record_path: Path
    """Where the chosen flags are kept between runs."""
    key: str
    """What the choice depends on: machine, threads, version, model."""
    chosen: dict[str, Flags] = field(default_factory=dict)
    """By workload label."""
    starts: dict[str, list[float]] = field(default_factory=dict)
    """Values so far: an engine that starts slowly does so only `start_repeats` times."""

    @property
    def name(self) -> str:
        """As in the report."""
        return self.spec.name

    def measure(self, workload: Workload) -> float:
        """The value with the best flags, which the first call searches."""
        if not self.spec.serves(workload.row):
            raise StropError(f"{self.name} takes no part in {workload.row}")
        starts = self.starts.setdefault(workload.label, [])
        if workload.row in ("start", "rss") and self.spec.start_repeats and len(starts) >= self.spec.start_repeats:
            return starts[-1]
        if workload.label not in self.chosen:
            self.chosen[workload.label] = self._recorded(workload) or self._search(workload)
        starts.append(self.adapter.measure(workload, self.chosen[workload.label]))
        return starts[-1]

    def _search(self, workload: Workload) -> Flags:
        candidates = self.spec.candidates(workload.row)
        if len(candidates) > 1:
            values = [self._best_of(workload, flags) for flags in candidates]
            order = max if workload.more_is_better else min
            best = candidates[values.index(order(values))]
        else:
            best = candidates[0] if candidates else {}
        records = self._records()
        records.setdefault(self.key, {}).setdefault(self.name, {})[workload.label] = best
        self.record_path.parent.mkdir(parents=True, exist_ok=True)
        self.record_path.write_text(json.dumps(records, indent=1))
        return best

    def _best_of(self, workload: Workload, flags: Flags) -> float:
        values = [self.adapter.measure(workload, flags) for _ in range(_SEARCH_ROUNDS)]
        return max(values) if workload.more_is_better else min(values)

    def _recorded(self, workload: Workload) -> Flags | None:
        flags = self._records().get(self.key, {}).get(self.name, {}).get(workload.label)
        return flags if flags in self.spec.candidates(workload.row) else None

    def _records(self) -> dict[str, Any]:
        try:
            records = json.loads(self.record_path.read_text())
        except (OSError, ValueError):
            return {}
        return records if isinstance(records, dict) else {}
