"""One `strop bench`: card, probe, fidelity, rows, bars."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from strop.bench.bars import check_bars, mark_coarse
from strop.bench.card import describe_card, describe_rates, machine_facts, static_card, versions
from strop.bench.limits import LIMITED_ROWS, best_value
from strop.bench.measure import STROP, Contender, Ours, first_token, interleave
from strop.bench.peers import Peer, find_peers, make_adapter
from strop.bench.report import Report, Row, measured_row, render_bars, render_missing, render_rows, shares_above_one
from strop.bench.workloads import Workload, workloads
from strop.core.config import EngineConfig, KvDtype
from strop.core.errors import StropError
from strop.engine.costs import CostModel
from strop.engine.engine import Engine
from strop.engine.loading import load_model
from strop.formats.pack_cache import cache_directory
from strop.machine.probe import KernelClock, MachineRates, probe
from strop.ops import native

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What `strop bench` was asked."""

    model: str
    rows: frozenset[str]
    batches: tuple[int, ...]
    repeats: int
    num_threads: int
    kv_dtype: KvDtype = "bf16"
    engines: tuple[str, ...] = ()
    peers_directory: Path = Path()


def run_bench(options: BenchOptions, say: Say) -> Report:
    """Measures and returns everything; `say` gets the text for people as it comes.

    Raises:
        StropError: the model cannot be loaded, or a peer that was asked for is not installed.
    """
    model_file = Path(options.model)
    specs = find_peers(list(options.engines), options.peers_directory, model_file) if options.engines else []
    config = EngineConfig(max_num_seqs=max(options.batches), kv_dtype=options.kv_dtype, num_threads=options.num_threads)
    loaded, config = load_model(options.model, config, on_plan=lambda plan: say(plan.describe()))
    engine = Engine(loaded, config)
    costs = CostModel(engine.params, engine.spec, engine.layout)
    report = Report(options.model, versions=versions())
    report.machine = machine_facts(config.num_threads, native.isa() if loaded.platform == "native" else None)
    report.card = static_card(costs, loaded.memory)
    say("\n" + describe_card(report.card))
    chosen = workloads(set(options.rows), list(options.batches))
    limit = _Limit(costs, config.num_threads)
    if limit.rates is not None:
        say(describe_rates(limit.rates, costs, chosen))
    cache = cache_directory() / "peers"
    key = _key(report, model_file)
    peers = [
        Peer(spec, make_adapter(spec, model_file, config.num_threads, cache), cache / "best-flags.json", key)
        for spec in specs
    ]
    try:
        for peer in peers:
            report.peers[peer.name] = {**peer.adapter.describe(), "pinned_version": peer.spec.pinned_version}
            say(f"{peer.name}: {report.peers[peer.name]}")
        if "fidelity" in options.rows:
            report.rows += _fidelity_rows(engine, options.model, peers, say)
            mark_coarse(report)
        clock = KernelClock(limit.library) if limit.library is not None and loaded.platform == "native" else None
        ours = Ours(engine, options.model, config.num_threads, clock)
        for workload in chosen:
            report.rows.append(_measure(workload, ours, limit, peers, options.repeats, say))
        _add_extra_rows(report, ours, options)
    finally:
        for peer in peers:
            peer.adapter.close()
    report.probe = {} if limit.rates is None else asdict(limit.rates)
    report.bars = check_bars(report)
    for part in (render_rows(report), render_missing(report), render_bars(report)):
        if part:
            say("\n" + part)
    for row in shares_above_one(report):
        say(f"\n{row.label} is at {row.share_of_limit:.0%} of the limit: the probe is wrong, or was slowed down")
    return report


class _Limit:
    """What the machine allows, measured like a contender, right before and right after ours in every round.

    A shared machine is not equally fast at all times: only neighbours can be compared.
    """

    def __init__(self, costs: CostModel, num_threads: int) -> None:
        self._costs, self._num_threads = costs, num_threads
        self.library = native.library() if costs.layout.platform == "native" else None
        self.rates = self._probe(3.0)
        """The best seen; None without native kernels to probe with."""

    def around(self, ours: Ours) -> list[Contender]:
        """Ours, between two measurements of the limit where there are any."""
        return [ours] if self.rates is None else [_Ceiling(self, "before"), ours, _Ceiling(self, "after")]

    def value(self, workload: Workload) -> float:
        """The workload's value at the limit, now; 0 if it has none."""
        if workload.row not in LIMITED_ROWS:
            return 0.0
        rates = self._probe(0.8)
        assert rates is not None and self.rates is not None
        self.rates = self.rates.better_of(rates)
        return best_value(self._costs, workload, rates)

    def _probe(self, seconds: float) -> MachineRates | None:
        if self.library is None:
            return None
        working_set_bytes = self._costs.decode_step(1, 128).num_bytes
        return probe(self.library, working_set_bytes, self._num_threads, seconds)


@dataclass(frozen=True, slots=True)
class _Ceiling:
    limit: _Limit
    name: str

    def measure(self, workload: Workload) -> float:
        """See _Limit.value."""
        return self.limit.value(workload)


def _measure(workload: Workload, ours: Ours, limit: _Limit, peers: list[Peer], repeats: int, say: Say) -> Row:
    begin = time.perf_counter()
    partners = [peer for peer in peers if peer.spec.serves(workload.row)]
    values, missing = interleave([*limit.around(ours), *partners], workload, repeats, cache_directory())
    ceilings = [max(pair) for pair in zip(values.pop("before", []), values.pop("after", []), strict=True)]
    row = measured_row(workload, ours.name, values, missing)
    if any(ceilings) and row.value is not None:
        row.shares_of_limit = [value / best for value, best in zip(row.values, ceilings, strict=True)]
        row.share_of_limit = median(row.shares_of_limit)
    row.flags = {peer.name: peer.chosen[workload.label] for peer in partners if peer.name in row.peers}
    others = ", ".join(f"{name} {value:.4g}" for name, value in row.peers.items())
    value = "no value" if row.value is None else f"{row.value:.4g} {row.unit}"
    say(f"{row.label}: {value}" + (f" ({others})" if others else "") + f"  [{time.perf_counter() - begin:.0f} s]")
    return row


def _add_extra_rows(report: Report, ours: Ours, options: BenchOptions) -> None:
    """What falls out of the others: the steps' host overhead, and the time of a command that does nothing."""
    for batch, samples in sorted(ours.steps.items()):
        overhead_ms = 1e3 * median(sample.overhead_s for sample in samples)
        step_ms = 1e3 * median(sample.wall_s for sample in samples)
        details = {"step_ms": step_ms, "outside": "the kernels" if ours.clock else "the compiled step"}
        report.rows.append(Row("host_overhead", {"batch": batch}, overhead_ms, "ms", details=details))
    if "start" in options.rows:
        values = [first_token([*STROP, "--help"])[1] for _ in range(options.repeats + 1)][1:]
        report.rows.append(Row("help", {}, median(values), "s", values=values))


def _fidelity_rows(engine: Engine, model: str, peers: list[Peer], say: Say) -> list[Row]:
    """One row per path: prompts, and tokens one at a time as they are generated."""
    from strop.bench import fidelity

    windows = fidelity.english_windows(engine.tokenizer)
    reference = fidelity.Reference(model, windows)
    rows = []
    for path, some in (("prompt", windows), ("generated", windows[: fidelity.NUM_DECODE_WINDOWS])):
        one_by_one = path == "generated"
        found = reference.compare(fidelity.our_logits(engine, some, one_by_one=one_by_one))
        row = Row("fidelity", {"path": path}, found.kl_nat.mean, "nat", details=asdict(found) | {"peers": {}})
        for peer in peers:
            if not peer.spec.serves("fidelity"):
                continue
            try:
                theirs = reference.compare(peer.adapter.logits(some, one_by_one=one_by_one))
            except StropError as error:
                row.missing[peer.name] = str(error)
                continue
            row.peers[peer.name] = theirs.kl_nat.mean
            row.details["peers"][peer.name] = asdict(theirs)
        rows.append(row)
        others = ", ".join(f"{name} {value:.2e}" for name, value in row.peers.items())
        say(
            f"fidelity, {path}: KL {found.kl_nat.mean:.2e} nat ({found.kl_nat.low:.2e}-{found.kl_nat.high:.2e}) over "
            f"{found.num_positions:,} positions" + (f" ({others})" if others else "")
        )
    return rows


def _key(report: Report, model_file: Path) -> str:
    """What the choice of a peer's flags depends on."""
    facts = [report.machine["processor"], report.machine["num_threads"], model_file.name]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
