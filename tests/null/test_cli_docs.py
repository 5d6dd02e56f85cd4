"""docs/cli.md is what scripts/cli_docs.py writes."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cli_docs.py"


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("cli_docs", SCRIPT)
    assert spec is not None and spec.loader is not None
    cli_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli_docs)
    assert "`--json`" in cli_docs.render()
    assert cli_docs.TARGET.read_text(encoding="utf-8") == cli_docs.render(), "out of date: run `make docs`"
