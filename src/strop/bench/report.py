"""Rows of measured values, as JSON and as tables for people."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from strop.bench.workloads import UNITS, Workload


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over a peer's, pair by pair; for seconds and bytes too, where less is better."""

    median: float
    low: float
    high: float


@dataclass(slots=True)
class Row:
    """One measured thing. Values are medians over the rounds."""

    name: str
    params: dict[str, Any]
    value: float | None
    unit: str
    share_of_limit: float | None = None
    """Median of `shares_of_limit`."""
    shares_of_limit: list[float] = field(default_factory=list)
    """Of every round: of the limit probed right before it or right after it, whichever was higher."""
    peers: dict[str, float] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    """Every round's."""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each peer's best."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a contender has no value."""
    details: dict[str, Any] = field(default_factory=dict)
    workload: Workload | None = None

    @property
    def label(self) -> str:
        """For people: `decode, batch 8`."""
        return ", ".join([self.name, *(f"{name} {value}" for name, value in self.params.items())])


@dataclass(slots=True)
class Report:
    """Everything one `strop bench` found."""

    model: str
    rows: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    card: dict[str, int] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each peer's version, ISA line, weights, and whether it is coarse."""
    bars: list[dict[str, Any]] = field(default_factory=list)

    def row(self, name: str, **params: Any) -> Row | None:
        """The row of this name and these parameters."""
        return next((row for row in self.rows if row.name == name and row.params == params), None)

    def as_json(self) -> dict[str, Any]:
        """Plain data; `rows` holds name, params, value, unit, share_of_limit and peers, and more."""
        plain = asdict(self)
        for row in plain["rows"]:
            del row["workload"]  # says nothing that name and params do not
        return plain


def measured_row(workload: Workload, ours: str, values: dict[str, list[float]], missing: dict[str, str]) -> Row:
    """A row from every contender's values, round by round."""
    mine = values.get(ours, [])
    row = Row(workload.row, dict(workload.params), median(mine) if mine else None, UNITS[workload.row])
    row.values, row.missing, row.workload = mine, missing, workload
    for name, theirs in values.items():
        if name == ours:
            continue
        row.peers[name] = median(theirs)
        pairs = [a / b for a, b in zip(mine, theirs, strict=False) if b > 0]
        if pairs:
            row.ratios[name] = Ratio(median(pairs), min(pairs), max(pairs))
    return row


def shares_above_one(report: Report) -> list[Row]:
    """Rows that beat the limit: nothing does, so the probe is wrong."""
    return [row for row in report.rows if row.share_of_limit is not None and row.share_of_limit > 1.0]


def render_rows(report: Report) -> str:
    """The rows as a table, a peer's ratio beside its value."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.peers))
    header = ["", "strop", "of the limit", *(f"{n} (coarse)" if _is_coarse(report, n) else n for n in names)]
    lines = [header]
    for row in report.rows:
        share = "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        if row.shares_of_limit:
            share += f" ({min(row.shares_of_limit):.0%}-{max(row.shares_of_limit):.0%})"
        cells = [f"{row.label} [{row.unit}]", _number(row.value), share]
        for name in names:
            ratio = row.ratios.get(name)
            spread = f" ({ratio.median:.2f}x, {ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""
            cells.append(_number(row.peers[name]) + spread if name in row.peers else "")
        lines.append(cells)
    return _table(lines)


def render_bars(report: Report) -> str:
    """Bar, measured, met or not."""
    rows = [[bar["name"], bar["at_least"], bar["measured"], _verdict(bar["met"])] for bar in report.bars]
    return _table([["bar", "at least", "measured", ""], *rows])


def render_missing(report: Report) -> str:
    """Why a value is absent; empty when none is. Peers that take no part in a row are not listed."""
    lines = [
        f"{row.label}: {name}: {reason}"
        for row in report.rows
        for name, reason in row.missing.items()
        if "takes no part" not in reason
    ]
    return "\n".join(lines)


def _is_coarse(report: Report, name: str) -> bool:
    return bool(report.peers.get(name, {}).get("coarse"))


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "NOT MET"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2e}"


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([rendered[0], "  ".join("-" * width for width in widths), *rendered[1:]])
