"""A plan as one HTML page that needs nothing else, with plots in the manner of Figure 1 of Pope et al. 2022."""

from collections.abc import Callable, Iterable
from html import escape
from importlib import resources

from strop.bench.serve.plots import Plot, Series, render_svg
from strop.cli.plan_text import Table, card_tables, chosen_facts, frontier_table
from strop.plan.candidate import Candidate
from strop.plan.search import Plan

Point = tuple[float, float]
Place = Callable[[Candidate], Point]
Batch = Callable[[Candidate], int]


def render_plan(plan: Plan, model: str) -> str:
    """The whole page."""
    style = resources.files("strop.bench.serve").joinpath("page.css").read_text("utf-8")
    machines = plan.wish.machines
    title = f"{model} on {machines.num_devices} x {machines.device.title}"
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in chosen_facts(plan))
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>",
        f"<h2>Chosen: {escape(plan.reason)}</h2><dl>{facts}</dl>",
        '<h2>Latency and cost</h2><div class="plots">',
        *map(render_svg, plots(plan)),
        "</div><p>Labels are devices/batch, where no other is both faster and cheaper; dashed: int8 weights.</p>",
        f"<h2>Frontier</h2>{_table(frontier_table(plan))}",
        *(f"<h2>{escape(title)}</h2>{_table(table)}" for title, table in card_tables(plan)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def plots(plan: Plan) -> list[Plot]:
    """Whole requests, and, as the paper's two panels, decode and prompts by themselves at each number of devices."""
    unit, factor = "device-milliseconds per token", 1e3
    if (price := plan.wish.price_per_device_hour) is not None:
        unit, factor = "cost per million tokens", 1e6 * price / 3600

    def plot(title: str, x_label: str, candidates: Iterable[Candidate], place: Place, batch: Batch) -> Plot:
        series = _curves(candidates, place, batch)
        return Plot(title, f"{x_label} (logarithmic)", f"{unit} (logarithmic)", series, True, True, True)

    def request(one: Candidate) -> Point:
        return one.e2e_s, factor * one.device_s_per_request / one.tokens_per_request

    def decode(one: Candidate) -> Point:
        return 1e3 * one.decode.seconds, factor * one.num_devices * one.decode.seconds / one.batch

    def prompt(one: Candidate) -> Point:
        return one.prompt.seconds, factor * one.num_devices * one.prompt.seconds / one.prompt_pass.tokens

    candidates = plan.candidates
    able = [one for one in candidates if one.copies * one.num_devices <= plan.wish.machines.num_devices]
    whole = [one for one in candidates if one.passes_per_prompt == 1]
    return [
        plot("Requests", "seconds of a request", able, request, lambda one: one.batch),
        plot("Decode", "milliseconds per token", candidates, decode, lambda one: one.batch),
        plot("Prompts", "seconds per pass", whole, prompt, lambda one: one.prompt_pass.batch),
    ]


def _curves(candidates: Iterable[Candidate], place: Place, batch: Batch) -> list[Series]:
    """A line for each number of devices and precision, through what none of its own beats.

    Points that none of all beats are labelled.
    """
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.num_devices, one.model.weight_dtype), []).append(one)
    lines = {key: _unbeaten(members, place) for key, members in groups.items()}
    best = {id(one) for one in _unbeaten([one for line in lines.values() for one in line], place)}
    colours = {count: number for number, count in enumerate(sorted({count for count, _ in groups}))}
    return [
        Series(
            f"{count} device{'s' if count > 1 else ''}, {dtype}",
            [place(one) for one in line],
            colours[count],
            is_dashed=dtype != "bf16",
            labels=tuple(f"{count}/{batch(one)}" if id(one) in best else "" for one in line),
        )
        for (count, dtype), line in lines.items()
    ]


def _unbeaten(candidates: Iterable[Candidate], place: Place) -> list[Candidate]:
    found: list[Candidate] = []
    for one in sorted(candidates, key=place):
        if not found or place(one)[1] < place(found[-1])[1]:
            found.append(one)
    return found


def _table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
