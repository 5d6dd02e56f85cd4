"""The report as one HTML page that needs nothing else: no script, no fonts, no network."""

from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from statistics import median

import numpy as np

from strop.bench.serve.figures import FigureTable, facts, latency_ms, notes, tables
from strop.bench.serve.load import ClosedLoop, Poisson
from strop.bench.serve.plots import Plot, Series, render_svg
from strop.bench.serve.records import Record, Summary, tokens_over_time
from strop.bench.serve.session import Cell, ServeReport

_NUM_CDF_POINTS = 201
_MIN_BINS, _MAX_BINS = 8, 60
_GAPS_PER_BIN = 10
"""Streams of one batch get their tokens at once: a bin of few gaps would show the beat, not the rate."""


def render_page(report: ServeReport) -> str:
    """The whole page."""
    style = resources.files("strop.bench.serve").joinpath("page.css").read_text("utf-8")
    title = f"Load on {', '.join(report.options.urls)}"
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>",
        _definitions(facts(report)),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(report)) + "</ul>",
        *map(_table, tables(report)),
        '<h2>Plots</h2><div class="plots">',
        *map(render_svg, plots(report)),
        "</div></body></html>\n",
    ]
    return "\n".join(parts)


def plots(report: ServeReport) -> list[Plot]:
    """Distributions of the latencies, throughput over time, and curves over the loads where there are several."""
    cells = [cell for cell in report.cells if any(summary.num_complete for summary in cell.summaries)]
    return [
        _cdf("TTFT", cells, lambda record: [record.ttft_s]),
        _cdf("ITL", cells, lambda record: record.itl_s),
        _cdf("E2E", cells, lambda record: [record.e2e_s]),
        _over_time(cells),
        *_curves(cells),
    ]


def _name(cell: Cell, cells: Iterable[Cell]) -> str:
    is_one_server = len({other.url for other in cells}) == 1
    return cell.load.label if is_one_server else f"{cell.url}, {cell.load.label}"


def _cdf(name: str, cells: list[Cell], values_s: Callable[[Record], list[float]]) -> Plot:
    series = []
    for number, cell in enumerate(cells):
        values_ms = [1e3 * v for one in cell.rounds for r in one.records if r.is_complete for v in values_s(r)]
        shares = np.linspace(0, 100, _NUM_CDF_POINTS)
        points = zip(np.percentile(values_ms, shares).tolist(), shares.tolist(), strict=True) if values_ms else ()
        series.append(Series(_name(cell, cells), list(points), number))
    return Plot(f"{name}: share of values below", f"{name}, ms (logarithmic)", "%", series, is_log_x=True)


def _over_time(cells: list[Cell]) -> Plot:
    series = []
    for number, cell in enumerate(cells):
        records, itl_s = cell.rounds[-1].records, cell.summaries[-1].itl_s
        duration_s = max((chunk_s for record in records for chunk_s in record.chunk_s), default=0.0)
        if duration_s > 0:
            gap_s = itl_s.p50 if itl_s else 0.0
            num_bins = round(min(max(duration_s / max(_GAPS_PER_BIN * gap_s, 1e-6), _MIN_BINS), _MAX_BINS))
            bin_s = duration_s / num_bins
            rates = tokens_over_time(records, bin_s, num_bins)
            points = [((i + 0.5) * bin_s, rate) for i, rate in enumerate(rates)]
            series.append(Series(_name(cell, cells), points, number))
    return Plot("Throughput over time, last round", "seconds from the round's start", "output tokens/s", series)


def _curves(cells: list[Cell]) -> list[Plot]:
    found = []
    for kind, x_label in ((ClosedLoop, "concurrent requests"), (Poisson, "requests per second")):
        some = [cell for cell in cells if isinstance(cell.load, kind)]
        if len({cell.load for cell in some}) < 2:
            continue
        title = f"{{}} over {x_label}"
        rate = [("", lambda summary: summary.output_tokens_per_s)]
        found.append(_curve(title.format("Throughput"), x_label, "output tokens/s", some, rate))
        for name, field in (("TTFT", "ttft_s"), ("ITL", "itl_s"), ("E2E", "e2e_s")):
            lines = [(statistic, latency_ms(field, statistic)) for statistic in ("p50", "p99")]
            found.append(_curve(title.format(name), x_label, f"{name}, ms", some, lines))
    return found


_Line = tuple[str, Callable[[Summary], float | None]]


def _curve(title: str, x_label: str, y_label: str, cells: list[Cell], lines: list[_Line]) -> Plot:
    series = []
    for number, url in enumerate(dict.fromkeys(cell.url for cell in cells)):
        for name, value in lines:
            points = []
            for cell in cells:
                values = [v for summary in cell.summaries if (v := value(summary)) is not None]
                if cell.url == url and values:
                    points.append((_amount(cell), median(values)))
            series.append(Series(f"{url} {name}".strip(), sorted(points), number, is_dashed=name == "p99"))
    return Plot(title, f"{x_label} (logarithmic)", y_label, series, is_log_x=True, has_marks=True)


def _amount(cell: Cell) -> float:
    load = cell.load
    return load.concurrency if isinstance(load, ClosedLoop) else load.rate_per_s if isinstance(load, Poisson) else 0.0


def _definitions(facts_: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts_) + "</dl>"


def _table(table: FigureTable) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
