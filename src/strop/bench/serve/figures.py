"""The report's figures as rows of text: which there are, how they are written, how servers compare."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

from strop.bench.serve.load import ClosedLoop, Load
from strop.bench.serve.records import Spread, Summary
from strop.bench.serve.rounds import Round
from strop.bench.serve.session import Cell, ServeReport

_LATENCIES = (
    ("TTFT", "ttft_s", 1),
    ("ITL", "itl_s", 2),
    ("TPOT", "tpot_s", 2),
    ("E2E", "e2e_s", 1),
)
_MIN_FOR_P99 = 100
_BUSY_SHARE = 0.5
_LATE_S = 0.01
_MANY_TOKENS = 1.05
_MAX_MESSAGES = 3


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report."""

    label: str
    value: Callable[[Summary], float | None]
    digits: int = 0
    """After the decimal point."""
    is_result: bool = True
    """Else it says what was measured, and servers are not compared by it."""

    def text(self, cell: Cell) -> str:
        """The median over the cell's rounds, with the lowest and the highest; empty if there is none."""
        values = self.values(cell)
        if not values:
            return ""
        low, middle, high = (f"{value:,.{self.digits}f}" for value in (min(values), median(values), max(values)))
        return middle if low == high else f"{middle} ({low}-{high})"

    def values(self, cell: Cell) -> list[float]:
        """One per round that has it."""
        return [value for summary in cell.summaries if (value := self.value(summary)) is not None]

    def ratio(self, cell: Cell, other: Cell) -> str:
        """Of `other` to `cell`, round by round: median, lowest, highest; empty for what is no result."""
        pairs = zip(cell.summaries, other.summaries, strict=False)
        ratios = [b / a for one, two in pairs if (a := self.value(one)) and (b := self.value(two)) is not None]
        if not ratios or not self.is_result:
            return ""
        return f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def latency_ms(field: str, statistic: str) -> Callable[[Summary], float | None]:
    """How to take one statistic of one of a summary's latencies."""

    def value(summary: Summary) -> float | None:
        found: Spread | None = getattr(summary, field)
        return None if found is None else 1e3 * getattr(found, statistic)

    return value


def _percent(field: str) -> Callable[[Summary], float | None]:
    return lambda summary: None if (share := getattr(summary, field)) is None else 100 * share


FIGURES = (
    Figure("output tokens/s", lambda s: s.output_tokens_per_s, 1),
    Figure("requests/min", lambda s: s.requests_per_minute, 1),
    Figure("goodput, requests/min", lambda s: s.good_requests_per_minute, 1),
    Figure("within the objective, %", _percent("good_share"), 1),
    *(
        Figure(f"{name} {statistic}, ms", latency_ms(field, statistic), digits)
        for name, field, digits in _LATENCIES
        for statistic in ("mean", "p50", "p90", "p99")
    ),
    Figure("cost per request", lambda s: s.cost_per_request, 7),
    Figure("cost per million output tokens", lambda s: s.cost_per_million_output_tokens, 4),
    Figure("requests", lambda s: s.num_requests, 0, False),
    Figure("failed", lambda s: sum(s.failures.values()), 0, False),
    Figure("cut off by Ctrl-C", lambda s: s.num_cut_off or None, 0, False),
    Figure("prompt tokens, mean", lambda s: s.prompt_tokens, 1, False),
    Figure("of them in the prefix cache, %", _percent("cached_share"), 1, False),
    Figure("output tokens, mean", lambda s: s.output_tokens, 1, False),
    Figure("tokens per chunk", lambda s: s.tokens_per_chunk, 2, False),
)


@dataclass(frozen=True, slots=True)
class FigureTable:
    """For a terminal or a page."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(report: ServeReport) -> list[FigureTable]:
    """One server: a column per load. Several: a table per load, with ratios to the first server."""
    by_load = cells_by_load(report)
    if len(report.options.urls) == 1:
        cells = [cell for _, some in by_load for cell in some]
        rows = [[figure.label, *(figure.text(cell) for cell in cells)] for figure in FIGURES]
        return [FigureTable(report.options.urls[0], ["", *(cell.load.label for cell in cells)], _filled(rows))]
    found = []
    for load, cells in by_load:
        first, *others = cells
        header = ["", first.url, *(text for cell in others for text in (cell.url, "ratio"))]
        rows = [
            [figure.label, figure.text(first)]
            + [text for cell in others for text in (figure.text(cell), figure.ratio(first, cell))]
            for figure in FIGURES
        ]
        found.append(FigureTable(load.label, header, _filled(rows)))
    return found


def cells_by_load(report: ServeReport) -> list[tuple[Load, list[Cell]]]:
    """The measured cells, in order."""
    found = [(load, [cell for cell in report.cells if cell.load == load]) for load in report.options.loads]
    return [(load, cells) for load, cells in found if cells]


def _filled(rows: list[list[str]]) -> list[list[str]]:
    return [row for row in rows if any(row[1:])]


def facts(report: ServeReport) -> list[tuple[str, str]]:
    """What the figures are about: label and text."""
    options = report.options
    found = [(one["url"], ", ".join(f"{name} {one[name]}" for name in one if name != "url")) for one in report.servers]
    found.append(("client", ", ".join(f"{name} {value}" for name, value in report.client.items())))
    rounds = (
        "1 round" if options.repeats == 1 else f"{options.repeats} rounds, their medians (lowest-highest) are shown"
    )
    found.append(("run", f"{report.started}; seed {options.seed}; {rounds}"))
    if options.shared_prefix_tokens:
        found.append(("shared prefix", f"{options.shared_prefix_tokens} tokens of every prompt"))
    if options.objective is not None:
        limits = asdict(options.objective).items()
        found.append(
            ("objective", ", ".join(f"{name} {1e3 * limit:g} ms" for name, limit in limits if limit is not None))
        )
    if options.price_per_hour is not None:
        found.append(("price", f"{options.price_per_hour:g} per hour"))
    return found


def notes(report: ServeReport) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if report.is_interrupted:
        found.append("Interrupted: the figures are of the rounds, or else the requests, that were complete until then")
    for kind, messages in report.failures.items():
        shown = "; ".join(list(dict.fromkeys(messages))[:_MAX_MESSAGES])
        found.append(f"{len(messages)} requests FAILED, {kind}: {shown}")
    for cell in report.cells:
        found += [f"{cell.url}, {cell.load.label}: {text}" for text in _cell_notes(cell)]
    if any(0 < summary.num_complete < _MIN_FOR_P99 for cell in report.cells for summary in cell.summaries):
        found.append(
            f"Where a round has fewer than {_MIN_FOR_P99} requests, p99 of TTFT, TPOT and E2E is close to the maximum"
        )
    found.append(_client_note([round_ for cell in report.cells for round_ in cell.rounds]))
    return found


def _client_note(rounds: list[Round]) -> str:
    num_chunks = sum(len(record.chunk_s) for round_ in rounds for record in round_.records)
    cost_us = 1e6 * sum(round_.client_cpu_s for round_ in rounds) / max(1, num_chunks)
    share = max((round_.client_share for round_ in rounds), default=0.0)
    note = f"The client took {cost_us:.0f} us of processor time per chunk, waking up for it included, and at most "
    note += f"{share:.0%} of a processor"
    return note + (": IT LIMITS THE FIGURES, use fewer streams or a faster machine" if share > _BUSY_SHARE else "")


def _cell_notes(cell: Cell) -> Iterator[str]:
    num_complete = sum(summary.num_complete for summary in cell.summaries)
    num_short = sum(summary.num_short for summary in cell.summaries)
    if num_short:
        yield f"{num_short} of {num_complete} answers have fewer tokens than asked for"
    per_chunk = [summary.tokens_per_chunk for summary in cell.summaries if summary.tokens_per_chunk is not None]
    if per_chunk and max(per_chunk) > _MANY_TOKENS:
        yield f"a chunk holds {max(per_chunk):.2f} tokens on average: ITL is between chunks, TPOT per token"
    if not isinstance(cell.load, ClosedLoop):
        lateness_s = max((round_.lateness_s for round_ in cell.rounds), default=0.0)
        if lateness_s > _LATE_S:
            yield f"requests were sent up to {1e3 * lateness_s:.0f} ms late: the client could not keep up"
