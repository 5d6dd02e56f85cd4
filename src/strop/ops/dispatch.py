"""Which implementation serves an operation's call, and a record of the calls made.

The reference defines an operation; a kernel overrides it on its platform and may decline with a reason. Resolution
happens while tracing, once per compiled step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from strop.core.errors import UnsupportedError

Platform = Literal["native", "xla"]
"""`native`: our CPU kernels where they do not decline. `xla`: the references, on whatever device jax has."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to serve an operation."""

    name: str
    platforms: tuple[Platform, ...]
    run: Callable[..., Any]
    declines: Callable[[Any], str | None] = lambda call: None
    """Takes the static call, returns the reason it cannot be served, or None."""


class Calls(list[Any]):
    """Static calls of operations, in order."""

    layers: list[int | None]
    """Of each call: the layer it belongs to, if any (`in_layer`)."""


_records: ContextVar[tuple[Calls, ...]] = ContextVar("strop_records", default=())
_layer: ContextVar[int | None] = ContextVar("strop_layer", default=None)


@contextmanager
def record() -> Iterator[Calls]:
    """Collects the static call of every operation traced inside the block."""
    calls = Calls()
    calls.layers = []
    token = _records.set((*_records.get(), calls))
    try:
        yield calls
    finally:
        _records.reset(token)


@contextmanager
def in_layer(layer: int) -> Iterator[None]:
    """Operations traced inside the block belong to this layer."""
    token = _layer.set(layer)
    try:
        yield
    finally:
        _layer.reset(token)


def resolve(implementations: tuple[Implementation, ...], call: Any, platform: Platform) -> Callable[..., Any]:
    """The first implementation for `platform` that does not decline `call`.

    Raises:
        UnsupportedError: all declined; the message lists every reason.
    """
    for calls in _records.get():
        calls.append(call)
        calls.layers.append(_layer.get())
    reasons = []
    for implementation in implementations:
        if platform not in implementation.platforms:
            continue
        reason = implementation.declines(call)
        if reason is None:
            return implementation.run
        reasons.append(f"{implementation.name}: {reason}")
    raise UnsupportedError(f"no implementation on {platform!r} serves {call}: {'; '.join(reasons) or 'none exists'}")
