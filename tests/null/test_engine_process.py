"""The engine's process, without an engine: what becomes of a step that fails."""

from types import SimpleNamespace
from typing import Any

import pytest

from strop.core.errors import CapacityError
from strop.core.request import TokenEvent
from strop.engine.messages import EngineStats, Failed, Stepped, decode_message, encode
from strop.engine.process import EngineServer


class Messages(list[Any]):
    """Stands for the socket."""

    def send(self, data: bytes) -> None:
        self.append(decode_message(data))


def failing_engine(error: Exception) -> Any:
    def step() -> None:
        raise error

    return SimpleNamespace(step=step, scheduler=SimpleNamespace(request_ids=["a", "b"]), abort=lambda _: None)


def test_what_an_engine_gives_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    messages, stepped = Messages(), Stepped([], EngineStats())
    server = EngineServer(None, messages)  # type: ignore[arg-type]
    monkeypatch.setattr(server, "_step_stats", lambda *_: EngineStats())
    server._step(failing_engine(CapacityError("no room")))
    assert messages == [Failed("a", "CapacityError", "no room"), Failed("b", "CapacityError", "no room"), stepped]
    assert server.step_began_s is None


def test_an_error_by_accident_ends_the_process() -> None:
    server = EngineServer(None, Messages())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        server._step(failing_engine(ZeroDivisionError()))


@pytest.mark.parametrize("fault", ["request", "engine", None])
def test_whose_fault_an_abort_is_crosses_over(fault: Any) -> None:
    step = Stepped([TokenEvent("r", 1, (), (), "abort", "why", fault=fault)], EngineStats())
    assert decode_message(encode(step)) == step
