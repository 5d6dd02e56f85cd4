"""What Strop must reach to be worth its name, checked against a report.

A bar is met, not met, or not measured (its row or its peer is absent). A peer whose own fidelity is COARSE_RATIO times
worse than ours is printed but sets no bar, except where a bar names it.
"""

from collections.abc import Iterator
from typing import Any

from strop.bench.report import Report, Row

COARSE_RATIO = 1.5
SAME_FILE = "llama.cpp"
"""The peer that runs the very same file."""


def mark_coarse(report: Report) -> None:
    """Sets `coarse` on every peer whose KL on the fidelity rows is more than COARSE_RATIO times ours."""
    row = report.row("fidelity", path="prompt")
    if row is None or row.value is None:
        return
    for name, kl in row.peers.items():
        report.peers.setdefault(name, {})["coarse"] = kl > COARSE_RATIO * row.value


def check_bars(report: Report) -> list[dict[str, Any]]:
    """Every bar as name, at_least, measured, met (None: not measured)."""
    return [
        {"name": name, "at_least": at_least, "measured": measured, "met": met}
        for name, at_least, measured, met in [
            *_fidelity(report),
            *_decode_alone(report),
            *_beside_peers(report),
            *_starts(report),
        ]
    ]


_Bar = tuple[str, str, str, bool | None]
_ABSENT = "-"


def _fidelity(report: Report) -> Iterator[_Bar]:
    for path in ("prompt", "generated"):
        row = report.row("fidelity", path=path)
        kl, theirs = (row.value, row.peers.get(SAME_FILE)) if row else (None, None)
        measured = _ABSENT if kl is None else f"{kl:.2e} nat" + (f", {kl / theirs:.2f} x" if theirs else "")
        met = None if kl is None or theirs is None else kl <= 1.1 * theirs
        yield f"fidelity, {path}: mean KL", f"<= 1.1 x {SAME_FILE}", measured, met
        ratio = row.details.get("perplexity_ratio") if row else None
        measured = _ABSENT if ratio is None else f"{ratio['mean']:.4f} ({ratio['low']:.4f}-{ratio['high']:.4f})"
        yield (
            f"fidelity, {path}: perplexity ratio",
            "<= 1.01",
            measured,
            None if ratio is None else ratio["mean"] <= 1.01,
        )


def _decode_alone(report: Report) -> Iterator[_Bar]:
    row = report.row("decode", batch=1)
    yield _against("decode, batch 1", row, SAME_FILE, 1.2)
    yield _against("decode, batch 1", row, f"{SAME_FILE} q4_0", 1.0)
    share = row.share_of_limit if row else None
    yield "decode, batch 1: share of the limit", "75 %", _percent(share), None if share is None else share >= 0.75
    overhead = report.row("host_overhead", batch=1)
    value = overhead.value if overhead else None
    measured = _ABSENT if value is None else f"{value:.3f} ms"
    yield "decode, batch 1: host overhead", "<= 0.15 ms", measured, None if value is None else value <= 0.15


def _beside_peers(report: Report) -> Iterator[_Bar]:
    for batch in (16, 32):
        row = report.row("decode", batch=batch)
        yield _against(f"decode, batch {batch}", row, _best_peer(report, row, SAME_FILE), 3.0, f"{SAME_FILE}'s best")
    row = report.row("decode", batch=32)
    value = row.value if row else None
    measured = _ABSENT if value is None else f"{value:,.0f} tokens/s"
    yield "decode, batch 32", "2,500 tokens/s", measured, None if value is None else value >= 2500
    for batch in (16, 32):
        row = report.row("throughput", batch=batch)
        yield _against(f"throughput, batch {batch}", row, _best_peer(report, row), 1.5, "the best peer")
    for num_tokens in (512, 2048):
        row = report.row("prefill", tokens=num_tokens)
        yield _against(f"prefill, {num_tokens} tokens", row, _best_peer(report, row), 1.3, "the best peer")


def _starts(report: Report) -> Iterator[_Bar]:
    for name, row, limit_s in (
        ("start to first token", report.row("start", batch=1), 1.0),
        ("strop --help", report.row("help"), 0.25),
    ):
        value = row.value if row else None
        measured = _ABSENT if value is None else f"{value:.2f} s"
        yield name, f"<= {limit_s} s", measured, None if value is None else value <= limit_s


def _best_peer(report: Report, row: Row | None, prefix: str = "") -> str | None:
    """The fastest peer of a row that is not coarse; with `prefix`, among that engine's."""
    peers = row.peers if row else {}
    fit = {
        name: v for name, v in peers.items() if name.startswith(prefix) and not report.peers.get(name, {}).get("coarse")
    }
    return max(fit, key=lambda name: fit[name]) if fit else None


def _against(name: str, row: Row | None, peer: str | None, factor: float, title: str = "") -> _Bar:
    at_least = f"{factor} x {title or peer}"
    ratio = row.ratios.get(peer) if row and peer else None
    if ratio is None:
        return name, at_least, _ABSENT, None
    named = f" {peer}" if title else ""
    return name, at_least, f"{ratio.median:.2f} x{named} ({ratio.low:.2f}-{ratio.high:.2f})", ratio.median >= factor


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{share:.0%}"
