"""`strop plan MODEL --hardware NAME`: searches, and shows what it found."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from strop.cli.output import print_facts, print_table
from strop.cli.plan_text import LEFT_ALIGNED, card_tables, chosen_facts, frontier_table
from strop.core.config import EngineConfig
from strop.core.errors import RequestError, UnsupportedError
from strop.formats.checkpoint import AnyCheckpoint
from strop.machine.catalog import THIS, Machines, find_machines
from strop.models.published import PUBLISHED, published_spec, unpublished
from strop.models.spec import ModelSpec
from strop.plan.emit import beyond_the_engine, plan_file
from strop.plan.objective import parse_objective
from strop.plan.search import Plan, Wish, search
from strop.plan.space import WEIGHT_DTYPES, parse_mesh
from strop.plan.traffic import Traffic, parse_traffic, recorded_traffic, traffic_for
from strop.plan.validate import pope_coefficients


def show_plan(
    model: str,
    *,
    hardware: str | None,
    objective: str,
    traffic: str | None,
    mesh: str | None,
    weights: str | None,
    price_per_hour: float | None,
    explain: bool,
    html: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Prints the plan, and writes the files that were asked for. Raises what `search` and the parsers raise."""
    wanted = parse_objective(objective)
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise RequestError(f"price_per_hour={price_per_hour} is no price: give a number of 0 or more")
    asked = None if traffic is None else read_traffic(traffic)
    machines = None if hardware in (None, THIS) else find_machines(str(hardware))
    spec, checkpoint = open_model(model)

    def wish(machines: Machines) -> Wish:
        shape = None if mesh is None else parse_mesh(mesh, machines)
        price = machines.device.usd_per_device_hour if price_per_hour is None else price_per_hour
        dtypes = WEIGHT_DTYPES if weights is None else (weights,)
        return Wish(spec, machines, traffic_for(spec, asked), wanted, pope_coefficients(), shape, dtypes, price)

    plan = search(wish(machines)) if machines is not None else _search_here(wish, checkpoint, weights)
    if html is not None:
        from strop.cli.plan_page import render_plan

        _write(html, render_plan(plan, model))
    if out is not None:
        _write(out, json.dumps(plan_file(plan, model), indent=1) + "\n")
        for text in beyond_the_engine(plan.chosen):
            print(f"strop: {out} cannot say: {text}", file=sys.stderr)
    if as_json:
        _print_json(plan, model, explain=explain)
    else:
        _print(plan, explain=explain)


def _search_here(wish: Callable[[Machines], Wish], checkpoint: AnyCheckpoint | None, weights: str | None) -> Plan:
    """On this machine, as it was calibrated; else it is probed for some seconds."""
    if checkpoint is not None and weights is not None:
        raise RequestError(f"--weights {weights}: on this machine a model runs as its file stores it: leave it out")
    from strop.plan.calibrate import machine_profile
    from strop.plan.local import published_copy, stored_copy, this_hardware

    profile = machine_profile()
    asked = replace(wish(this_hardware(profile)), groups_prompts=False)
    config, machines = EngineConfig(), asked.machines
    if checkpoint is not None:
        return search(asked, [stored_copy(checkpoint, asked.spec, profile, config, machines)])
    return search(
        asked, [published_copy(asked.spec, dtype, profile, config, machines) for dtype in asked.weight_dtypes]
    )


def open_model(model: str) -> tuple[ModelSpec, AnyCheckpoint | None]:
    """Of a published name, or of a file, folder or Hub id, whose weights are not read."""
    if model in PUBLISHED:
        return published_spec(model), None
    from strop.formats.checkpoint import open_checkpoint
    from strop.models.reader import load_spec

    if "/" not in model and not Path(model).exists():
        raise UnsupportedError(f"no file or folder is called {model!r:.80}, and {unpublished(model)}")
    checkpoint = open_checkpoint(model)
    spec = load_spec(checkpoint)
    if not spec.causal:
        raise UnsupportedError(f"{model}: an encoder, which writes no answers: plan for a decoder")
    return spec, checkpoint


def read_traffic(text: str) -> Traffic:
    """Of `in=512,out=128`, or a CSV file of arrivals."""
    if "=" in text and not Path(text).exists():
        return parse_traffic(text)
    from strop.bench.serve.load import read_trace

    arrivals = read_trace(Path(text))
    lengths = [arrival.lengths for arrival in arrivals]
    return recorded_traffic(
        [arrival.time_s for arrival in arrivals],
        [one.prompt_tokens for one in lengths],
        [one.output_tokens for one in lengths],
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): give another path") from None


def _print_json(plan: Plan, model: str, *, explain: bool) -> None:
    found = {"model": model, **plan.as_json()}
    if explain:
        from strop.plan.explain import explain as explain_chosen

        found["explain"] = [card.as_json() for card in explain_chosen(plan.chosen)]
    print(json.dumps(found, indent=1))


def _print(plan: Plan, *, explain: bool) -> None:
    header, rows = frontier_table(plan)
    print_table(header, rows, right_aligned=set(header) - LEFT_ALIGNED)
    print()
    print_facts([("chosen", plan.reason), *chosen_facts(plan)])
    if explain:
        for title, (header, rows) in card_tables(plan):
            print(f"\n{title}")
            print_table(header, rows, right_aligned=header[1:7])
