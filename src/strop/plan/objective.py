"""What a plan is to achieve: bounds on latencies, and what to make the most of within them."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from strop.core.errors import RequestError

Latency = Literal["ttft", "itl", "max_itl", "e2e"]
LATENCIES: tuple[Latency, ...] = get_args(Latency)
"""Time to the first token, mean and longest time between tokens, and from the request to the last token."""
Aim = Literal["cost", "latency", "throughput", "balance"]
AIMS: tuple[Aim, ...] = get_args(Aim)

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


@dataclass(frozen=True, slots=True)
class Objective:
    """Bounds in seconds, and the aim among configurations that keep them."""

    bounds_s: dict[Latency, float] = field(default_factory=dict)
    aim: Aim = "balance"
    """balance: the cheapest that takes at most twice as long as the fastest."""


def parse_objective(text: str) -> Objective:
    """Of "", "ttft=200ms,itl=30ms", "latency", "e2e=2s,throughput". With bounds alone the aim is cost.

    Raises:
        RequestError: an unknown name, a bound that is no time above 0, or something said twice.
    """
    bounds_s: dict[Latency, float] = {}
    aim: Aim | None = None
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        aims = [known for known in AIMS if known == name]
        latencies = [known for known in LATENCIES if known == name]
        if aims and not equals:
            if aim is not None:
                raise RequestError(f"objective: both {aim!r} and {name!r}: give one aim, and bounds for the rest")
            aim = aims[0]
        elif latencies and equals:
            if latencies[0] in bounds_s:
                raise RequestError(f"objective: {name!r} has two bounds: give the smaller")
            bounds_s[latencies[0]] = _seconds(name, value)
        else:
            raise RequestError(
                f"objective {part!r:.80} is unknown: give bounds ({', '.join(LATENCIES)}) such as ttft=200ms, and what "
                f"to look for ({', '.join(AIMS)})"
            )
    return Objective(bounds_s, aim or ("cost" if bounds_s else "balance"))


def _seconds(name: str, text: str) -> float:
    match = re.fullmatch(r"([0-9.]{1,20}(?:e-?[0-9]{1,3})?)\s*([a-z]+)", text)
    try:
        seconds = float(match[1]) * _SECONDS[match[2]] if match else math.nan
    except (ValueError, KeyError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(
            f"objective {name}={text!r:.40} is not a time above 0: give a number and a unit ({', '.join(_SECONDS)}), "
            f"such as {name}=200ms"
        )
    return seconds
