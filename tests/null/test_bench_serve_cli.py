"""`strop bench serve` on its command line, and what it prints and writes."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_server import Step, TinyServer, refusal, well

from strop.cli import bench_serve, main, verb

SHORT = ["--concurrency", "1,2", "--requests", "3", "--input-tokens", "12", "--output-tokens", "2", "--repeats", "2"]


def run(*arguments: str) -> int:
    """The exit code."""
    try:
        verb.run_verb(bench_serve.command, list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_verb_has_two_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, usage in (
        (["bench", "serve"], "Usage: strop bench serve [OPTIONS] URLS..."),
        (["bench"], "Usage: strop bench [OPTIONS] [MODEL]"),
    ):
        monkeypatch.setattr(sys, "argv", ["strop", *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(usage)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['strop', 'bench', 'serve', '--help']\nfrom strop.cli.main import main\n"
        "try: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "strop.cli.bench_serve" in loaded
    assert not loaded & {"jax", "numpy", "rich", "uvloop", "httptools", "strop.bench.serve.session"}


def test_a_report_in_all_its_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    written = [str(tmp_path / "out.json"), str(tmp_path / "out.html")]
    options = [
        "--objective",
        "e2e=60s",
        "--price-per-hour",
        "2",
        "--seed",
        "5",
        "--json",
        written[0],
        "--html",
        written[1],
    ]
    with TinyServer() as server:
        assert run(server.url, *SHORT, *options) == 0
        assert all("Bearer sk-of-the-environment\r\n" in head for head in server.heads)
    printed = capsys.readouterr()
    rows = {cells[0]: cells[1:] for line in printed.out.splitlines() if len(cells := line.split("\t")) == 3}
    assert rows[""] == ["concurrency 1", "concurrency 2"]
    assert rows["requests"] == ["3", "3"]
    assert rows["within the objective, %"] == ["100.0", "100.0"]
    assert rows["prompt tokens, mean"] == ["12.0", "12.0"]
    assert {
        f"{name} {one}, ms" for name in ("TTFT", "ITL", "TPOT", "E2E") for one in ("mean", "p50", "p90", "p99")
    } <= rows.keys()
    assert {"cost per request", "cost per million output tokens", "goodput, requests/min"} <= rows.keys()
    assert "seed 5; 2 rounds" in printed.out
    assert "concurrency 2, round 2 of 2: " in printed.err

    report = json.loads(Path(written[0]).read_text())
    assert [(cell["load"], len(cell["rounds"])) for cell in report["cells"]] == [
        ("concurrency 1", 2),
        ("concurrency 2", 2),
    ]
    first = report["cells"][0]["rounds"][0]
    assert first["summary"]["num_complete"] == len(first["records"]) == 3
    assert len(first["records"][0]["chunk_s"]) == 2
    page = Path(written[1]).read_text()
    check_page(page)
    assert page.count("<figure>") == 8
    assert "sk-of-the-environment" not in page + json.dumps(report) + printed.out + printed.err


def check_page(page: str) -> None:
    """Well-formed, and nothing in it is fetched or run."""
    tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "img", "iframe", "object"), tag
            assert not {name for name, _ in attrs} & {"src", "href", "onclick"}
            if tag != "meta" and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
                tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tags[-1:] == [tag]:
                tags.pop()

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)

    Checker().feed(page)
    assert tags == []
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg


def test_several_servers_are_compared_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    with TinyServer() as one, TinyServer() as two:
        assert run(one.url, two.url, *SHORT, "--html", str(page)) == 0
    out = capsys.readouterr().out
    tables = [line.split("\t") for line in out.splitlines() if line.startswith("\t")]
    assert tables == [["", one.url, two.url, "ratio"]] * 2
    rates = [line.split("\t") for line in out.splitlines() if line.startswith("output tokens/s\t")]
    assert all(re.fullmatch(r"[\d.]+x \([\d.]+-[\d.]+\)", row[3]) for row in rates)
    check_page(page.read_text())


def test_what_a_server_says_is_only_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hostile(body: dict[str, Any], number: int) -> Iterator[Step]:
        return iter([refusal(500, "<script>alert(1)</script>\x1b]0;title\x07")]) if number % 2 else well(body, number)

    page = tmp_path / "out.html"
    with TinyServer(hostile) as server:
        assert run(server.url, *SHORT, "--warmup", "0", "--model", "<b>&", "--html", str(page)) == 1
    printed = capsys.readouterr()
    assert "6 requests FAILED, HTTP 500: <script>" in printed.out
    assert "3 of 3 requests FAILED" in printed.err or "of 3 requests FAILED" in printed.err
    assert "\x1b" not in printed.out + printed.err
    check_page(page.read_text())


def test_the_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    file = tmp_path / "key"
    file.write_text("sk-of-the-file\n")
    with TinyServer() as server:
        assert run(server.url, *SHORT, "--api-key-file", str(file)) == 0
        assert all("Bearer sk-of-the-file\r\n" in head for head in server.heads)
        file.write_text("sk-secret\r\nX-Evil: 1\n")
        assert run(server.url, "--api-key-file", str(file)) == 1
        assert run(server.url, "--api-key-file", str(tmp_path / "none")) == 1
    err = capsys.readouterr().err
    assert f"--api-key-file {file} is not a key" in err
    assert "cannot be read (No such file" in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,x"], "--concurrency '1,x' is not a list of different numbers above 0"),
        (["--concurrency", "0"], "--concurrency '0' is not"),
        (["--concurrency", "2,2"], "--concurrency '2,2' is not"),
        (["--concurrency", "1,8", "--requests", "4"], "--requests 4 are too few for 8 clients"),
        (["--rate", "nan"], "--rate 'nan' is not"),
        (["--rate", "-1"], "--rate '-1' is not"),
        (["--objective", "ttft=5"], "--objective 'ttft=5' is not a limit"),
        (
            ["--input-tokens", "64", "--shared-prefix-tokens", "64"],
            "--shared-prefix-tokens 64 leaves nothing of a prompt of 64",
        ),
        (["--trace", "none.csv"], "none.csv cannot be read"),
        (["--json", "no/such/folder.json"], "no/such/folder.json cannot be written"),
        (["http://127.0.0.1:1"], "a server is named twice"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("http://127.0.0.1:1", *options) == 1
    assert message in capsys.readouterr().err


def test_a_trace_alone_and_its_lengths_under_other_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,prompt_tokens,output_tokens\n0,10,1\n0.01,14,3\n")
    with TinyServer() as server:
        assert run(server.url, "--trace", str(trace), "--repeats", "1") == 0
        assert run(server.url, "--trace", str(trace), "--rate", "500", "--requests", "4", "--repeats", "1") == 0
        assert run(server.url, "--trace", str(trace), "--requests", "4") == 1
    printed = capsys.readouterr()
    assert "--requests does not shorten a trace" in printed.err
    assert "\ttrace trace.csv\n" in printed.out
    assert "\t500 requests/s\n" in printed.out
    assert printed.out.count("prompt tokens, mean\t12.0") == 2
