"""Objectives, traffic and plan files: what is read, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from strop.cli import plan as plan_verb
from strop.cli import run, serve
from strop.cli.plan_search import open_model, read_traffic
from strop.core.errors import FormatError, RequestError, StropError, UnsupportedError
from strop.core.plan_file import read_engine_settings
from strop.models.published import published_spec
from strop.plan.objective import Objective, parse_objective
from strop.plan.traffic import Traffic, parse_traffic, recorded_traffic, traffic_for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Objective({}, "balance")),
        ("ttft=200ms,itl=30ms", Objective({"ttft": 0.2, "itl": 0.03}, "cost")),
        ("e2e = 2s , throughput", Objective({"e2e": 2.0}, "throughput")),
        ("max_itl=1.5min", Objective({"max_itl": 90.0}, "cost")),
        ("latency", Objective({}, "latency")),
    ],
)
def test_objectives(text: str, expected: Objective) -> None:
    found = parse_objective(text)
    assert found.aim == expected.aim
    assert found.bounds_s == pytest.approx(expected.bounds_s)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft", "'ttft' is unknown: give bounds"),
        ("speed=3ms", "'speed=3ms' is unknown: give bounds"),
        ("cost=3s", "'cost=3s' is unknown"),
        ("ttft=200", "ttft='200' is not a time above 0: give a number and a unit"),
        ("ttft=0ms", "not a time above 0"),
        ("ttft=-1ms", "not a time above 0"),
        ("ttft=nanms", "not a time above 0"),
        ("ttft=1e999s", "not a time above 0"),
        ("ttft=1.2.3s", "not a time above 0"),
        ("ttft=3 parsecs", "not a time above 0"),
        ("ttft=1s,ttft=2s", "'ttft' has two bounds"),
        ("cost,latency", "both 'cost' and 'latency'"),
    ],
)
def test_objectives_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_objective(text)


def test_traffic() -> None:
    assert parse_traffic("in=100,out=50,rate=0.5") == Traffic(100, 50, 0.5, 150)
    assert parse_traffic("out=50") == Traffic(512, 50, None, 562)
    short = replace(published_spec("palm-8b"), max_context_len=256)
    assert traffic_for(short, None) == Traffic(192, 64, None, 256)
    with pytest.raises(RequestError, match=r"up to 2,049 tokens, .* context of 2,048"):
        traffic_for(published_spec("palm-8b"), parse_traffic("in=2000,out=49"))


@pytest.mark.parametrize(
    "text", ["in", "in=0", "in=-1", "in=1.5", "out=", "rate=0", "rate=nan", "rate=inf", "size=3", "in=1,in=2", "in=1e9"]
)
def test_traffic_refused(text: str) -> None:
    with pytest.raises(RequestError, match="traffic"):
        parse_traffic(text)


def test_recorded_traffic(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv"
    lines = [f"{second},100,20" for second in range(100)] + [f"{100 + i / 10},300,40" for i in range(100)]
    path.write_text("time_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    found = read_traffic(str(path))
    assert (found.input_tokens, found.output_tokens, found.context_len) == (200, 30, 340)
    assert found.rate_per_s == pytest.approx((100 + 50) / 60, rel=0.02)  # of the busiest minute
    assert recorded_traffic([5.0], [7], [3]) == Traffic(7, 3, None, 10)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("time,in,out\n0,1,1", "line 1 is 'time,in,out': it must be"),
        ("0,5,5\n-1,5,5", r"line 3: 'time_s' is '-1'"),
        ("3,5,5\n2,5,5", r"line 3: 'time_s' is 2, earlier than the line before: sort"),
        ("0,5,5\n1,,5", "line 3 is '1,,5': it needs 3 cells, none of them empty"),
        ("0,5,5\n\n2,5,5", "line 3 is '': it needs 3 cells"),
        ("0,5,0", "line 2: 'output_tokens' is '0'"),
        ("", "has no arrivals"),
    ],
)
def test_recorded_traffic_refused(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "arrivals.csv"
    path.write_text(lines if lines.startswith("time,") else f"time_s,prompt_tokens,output_tokens\n{lines}")
    with pytest.raises(RequestError, match=message):
        read_traffic(str(path))


def test_models() -> None:
    assert open_model("palm-62b")[0].num_layers == 64
    with pytest.raises(UnsupportedError, match="did you mean palm-62b"):
        open_model("palm-63b")


# --- the command ------------------------------------------------------------------------------------------------------


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(plan_verb.command, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_the_page_and_the_card(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    text = shown("palm-8b", "--hardware", "h200x8", "--traffic", "rate=4", "--explain", "--html", str(page))
    header = text.splitlines()[0].split("\t")
    assert header[1:5] == ["devices", "mesh", "weights", "batch"]
    assert "chosen\tthe cheapest that takes at most 2 times" in text
    assert "product in\t32\t" in text and "waits for" in text
    html = page.read_text()
    assert html.count("<svg viewBox") >= 3 and "Frontier" in html
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in html


def test_names_cannot_write_html(tmp_path: Path) -> None:
    from strop.cli.plan_page import render_plan
    from strop.cli.plan_search import search
    from strop.machine.catalog import find_machines
    from strop.plan.search import Wish

    plan = search(Wish(published_spec("palm-8b"), find_machines("l4"), Traffic()))
    assert "<b>" not in render_plan(plan, "<b>x")


def test_json_is_strict_and_prices_follow() -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    found = json.loads(
        shown("palm-8b", "--hardware", "l4x2", "--json", "--price-per-hour", "3.6", "--explain"), parse_constant=refuse
    )
    chosen = found["chosen"]
    assert chosen in found["frontier"]
    assert chosen["cost_per_request"] == pytest.approx(chosen["device_s_per_request"] / 1000)
    assert chosen["cost_per_million_tokens"] == pytest.approx(chosen["cost_per_request"] * 1e6 / 640)
    assert {row["binds"] for card in found["explain"] for row in card["rows"]} <= {
        *("compute", "weights", "cache", "links", "overhead")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a model"),
        (["palm-8b", "--validate"], "give either a model"),
        (["--calibrate", "--validate"], "give either a model"),
        (["palm-8b", "--hardware", "h20"], "near it are h200"),
        (["palm-8b", "--hardware", "h200x8", "--mesh", "3"], "do not divide"),
        (["palm-8b", "--hardware", "h200", "--html", "/none/at/all"], "cannot be written"),
        (["palm-8b", "--hardware", "h200", "--traffic", "none.csv"], "cannot be read"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(StropError, match=message):
        shown(*arguments)


def test_no_jax_is_imported() -> None:
    program = """
import sys
from strop.cli.plan import command
command.main(["palm-540b", "--hardware", "tpu-v4x64"], standalone_mode=False)
assert "jax" not in sys.modules, sorted(name for name in sys.modules if "jax" in name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


# --- plan files -------------------------------------------------------------------------------------------------------


def parsed(command: click.Command, *arguments: str) -> dict[str, object]:
    with command.make_context(command.name, list(arguments)) as context:
        return context.params


def test_serve_and_run_take_a_plan_and_options_win(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    shown("palm-8b", "--hardware", "l4", "--traffic", "in=300,out=50", "--out", str(path))
    settings = read_engine_settings(path)
    found = parsed(serve.command, "m.gguf", "--plan", str(path))
    assert found["max_seqs"] == settings["max_num_seqs"]
    assert found["max_step_tokens"] == settings["max_step_tokens"]
    assert found["context"] == 350
    assert parsed(serve.command, "m.gguf", "--plan", str(path), "--max-seqs", "3")["max_seqs"] == 3
    assert parsed(run.command, "m.gguf", "hello", "--plan", str(path))["context"] == 350
    assert parsed(serve.command, "m.gguf")["max_seqs"] is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"engine": 3}', '{"engine": {"size": 3}}', '{"engine": {"max_num_seqs": true}}', "[" * 9999],
)
def test_files_that_are_no_plans(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=r"plan.json"):
        read_engine_settings(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_engine_settings(tmp_path / "none.json")
