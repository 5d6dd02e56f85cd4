"""A plan as one HTML page that needs nothing else, with plots in the manner of Figure 1 of Pope et al. 2022."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources

from strop.bench.serve.plots import Plot, Series, render_svg
from strop.cli.plan_text import Table, card_tables, chosen_facts, frontier_table
from strop.plan.candidate import Candidate
from strop.plan.search import Plan, pareto

Figure = Callable[[Candidate], float]


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
        "</div><p>Points are labelled devices/batch; dashed: int8 weights.</p>",
        f"<h2>Frontier</h2>{_table(frontier_table(plan))}",
        *(f"<h2>{escape(title)}</h2>{_table(table)}" for title, table in card_tables(plan)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def plots(plan: Plan) -> list[Plot]:
    """Whole requests, and, as the paper's two panels, decode and prompts by themselves at each number of devices."""
    unit, factor = "device-seconds", 1.0
    if (price := plan.wish.price_per_device_hour) is not None:
        unit, factor = "cost", price / 3600

    def per_million(one: Candidate) -> float:
        return 1e6 * factor * one.device_s_per_request / one.tokens_per_request

    def decode(one: Candidate) -> float:
        return 1e6 * factor * one.num_devices * one.decode.seconds / one.batch

    def prompt(one: Candidate) -> float:
        return 1e6 * factor * one.num_devices * one.prompt.seconds / one.prompt_pass.tokens

    whole = [one for one in plan.candidates if one.passes_per_prompt == 1]
    frontier = Series(
        "frontier",
        [(one.e2e_s, per_million(one)) for one in plan.frontier],
        7,
        labels=tuple(f"{one.num_devices}/{one.batch}" for one in plan.frontier),
    )
    able = [one for one in plan.candidates if one.copies * one.num_devices <= plan.wish.machines.num_devices]
    y_label = f"{unit} per million tokens"
    return [
        Plot(
            "Requests: latency and cost",
            "seconds from first to last token (logarithmic)",
            y_label,
            [*_curves(able, lambda one: one.e2e_s, per_million), frontier],
            is_log_x=True,
            has_marks=True,
        ),
        Plot(
            "Decode",
            "milliseconds per token (logarithmic)",
            y_label,
            _curves(plan.candidates, lambda one: 1e3 * one.decode.seconds, decode, lambda one: one.batch),
            is_log_x=True,
            has_marks=True,
        ),
        Plot(
            "Prompts",
            "seconds per pass (logarithmic)",
            y_label,
            _curves(whole, lambda one: one.prompt.seconds, prompt, lambda one: one.prompt_pass.batch),
            is_log_x=True,
            has_marks=True,
        ),
    ]


def _curves(
    candidates: Iterable[Candidate], x: Figure, y: Figure, batch: Callable[[Candidate], int] | None = None
) -> list[Series]:
    """A line for each number of devices and precision: its own frontier, or the fastest of each batch, labelled."""
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.num_devices, one.model.weight_dtype), []).append(one)
    colours = {count: number for number, count in enumerate(dict.fromkeys(count for count, _ in groups))}
    found = []
    for (count, dtype), members in groups.items():
        labels: tuple[str, ...] = ()
        shown: Sequence[Candidate] = pareto(members)
        if batch is not None:
            fastest: dict[int, Candidate] = {}
            for one in members:
                if batch(one) not in fastest or x(one) < x(fastest[batch(one)]):
                    fastest[batch(one)] = one
            shown = [fastest[size] for size in sorted(fastest)]
            labels = tuple(f"{count}/{size}" for size in sorted(fastest))
        name = f"{count} device{'s' if count > 1 else ''}, {dtype}"
        points = [(x(one), y(one)) for one in shown]
        found.append(Series(name, points, colours[count], is_dashed=dtype != "bf16", labels=labels))
    return found


def _table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
