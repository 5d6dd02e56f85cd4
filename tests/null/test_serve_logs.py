"""Log lines: one for each record, whatever it quotes."""

import json
import logging
from collections.abc import Iterator

import pytest

from strop.serve.logs import set_up_logs


@pytest.fixture(autouse=True)
def logs_stay_as_they_are() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("text")
    logging.getLogger("strop.x").info("refused: %s", "a\n2026 INFO strop.x: b\r", extra={"request_id": "r"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO strop.x: refused: a\\n2026 INFO strop.x: b\\r request_id=r")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("strop.x").exception("a\nb", extra={"request_id": "r", "tokens": 3})
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["message"], line["level"], line["request_id"], line["tokens"]) == ("a\nb", "ERROR", "r", 3)
    assert line["time"].endswith("+00:00") and "ValueError: bad" in line["exception"]
