"""Reads what `strop plan --out` writes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from strop.core.config import EngineConfig
from strop.core.errors import FormatError, RequestError

MAX_FILE_BYTES = 1 << 20


class PlannedPrompts(msgspec.Struct):
    """How prompts are taken in."""

    prompts_at_once: int


class PlannedStep(msgspec.Struct):
    """A step of answers."""

    step_s: float


class PlannedRun(msgspec.Struct):
    """What was predicted of the chosen configuration."""

    batch: int
    prompt: PlannedPrompts
    decode: PlannedStep
    ttft_s: float
    itl_s: float
    max_itl_s: float
    e2e_s: float
    requests_per_min: float
    output_tokens_per_s: float


class PlannedTraffic(msgspec.Struct):
    """Requests of these lengths."""

    input_tokens: int
    output_tokens: int


class PlanFacts(msgspec.Struct):
    """What a plan was made for, and promises."""

    model: str
    hardware: str
    devices: int
    traffic: PlannedTraffic
    chosen: PlannedRun

    def __post_init__(self) -> None:
        sizes = self.devices, self.traffic.input_tokens, self.traffic.output_tokens, self.chosen.batch
        if not all(1 <= size <= 1 << 24 for size in (*sizes, self.chosen.prompt.prompts_at_once)):
            raise ValueError("a number of devices, tokens or sequences out of range")


def read_engine_settings(path: Path) -> dict[str, Any]:
    """The fields of EngineConfig that a plan sets.

    Raises:
        RequestError: the file cannot be read.
        FormatError: it is not a plan, or has a field or a value that EngineConfig has not.
    """
    return _engine_settings(path, _read(path))


def read_plan(path: Path) -> tuple[dict[str, Any], PlanFacts]:
    """The fields of EngineConfig that a plan sets, and what it promises. Raises as `read_engine_settings`."""
    found = _read(path)
    try:
        facts = msgspec.convert(found.get("plan"), PlanFacts)
    except (msgspec.ValidationError, ValueError) as error:
        raise FormatError(
            f"{path.name}: what the plan promises cannot be read ({error}): make the plan again"
        ) from None
    return _engine_settings(path, found), facts


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the plan {str(path)!r} cannot be read ({error.strerror}): check its path") from None
    try:
        found = json.loads(content) if len(content) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("engine"), dict):
        raise FormatError(f"{path.name} is not a plan: make one with `strop plan MODEL --out FILE`")
    return found


def _engine_settings(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = found["engine"]
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    for name, value in settings.items():
        if name not in defaults or type(value) is not type(defaults[name]):
            raise FormatError(
                f"{path.name}: the engine's setting {name!r:.40}={value!r:.40} is not one of this Strop's: make the "
                "plan again"
            )
    return settings
