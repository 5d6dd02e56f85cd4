"""Takes the measurements: ours, and any others between them, one at a time."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, Workload, prompts
from strop.core.errors import StropError
from strop.core.request import Request, SamplingParams
from strop.machine.probe import KernelClock

if TYPE_CHECKING:  # importing this module must not drag in jax
    from strop.engine.engine import Engine

STROP = [sys.executable, "-c", "from strop.cli.main import main; main()"]
"""The command itself, whether or not a script of that name is on the path."""


class Contender(Protocol):
    """Anything that can be measured."""

    @property
    def name(self) -> str:
        """As in the report."""
        ...

    def measure(self, workload: Workload) -> float:
        """The workload's value, in its unit. StropError when this contender cannot."""
        ...


@contextmanager
def machine_to_ourselves(directory: Path) -> Iterator[None]:
    """Waits until no other benchmark measures; holds a lock file in `directory` meanwhile."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "bench.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(slots=True)
class StepSample:
    """The decode steps of one measurement: medians per step."""

    wall_s: float
    overhead_s: float
    """Outside the kernels."""


@dataclass
class Ours:
    """Our engine, in this process; `start` and `rss` in processes of their own."""

    engine: "Engine"
    model: str
    num_threads: int
    clock: KernelClock | None = None
    name: str = "strop"
    seed: int = 0
    steps: dict[int, list[StepSample]] = field(default_factory=dict)
    """By batch, one per decode measurement."""

    def measure(self, workload: Workload) -> float:
        """See Workload."""
        self.seed += 1
        if workload.row == "decode":
            return self._decode(workload.amount)
        if workload.row == "throughput":
            return self._throughput(workload.amount)
        if workload.row == "prefill":
            begin = time.perf_counter()
            self._add(1, workload.amount, 1)
            self._finish()
            return workload.amount / (time.perf_counter() - begin)
        first_s, _, peak_rss_bytes = first_token(self._run_command(1 if workload.row == "start" else ANSWER_TOKENS))
        return first_s if workload.row == "start" else peak_rss_bytes / 2**20

    def _decode(self, batch: int) -> float:
        """Counts the steps that take in one token of every sequence; those admitted first run on until all have."""
        engine = self.engine
        self._add(batch, PROMPT_TOKENS, ANSWER_TOKENS + 1 + batch * PROMPT_TOKENS // engine.config.max_step_tokens + 2)
        walls: list[float] = []
        overheads: list[float] = []
        total_s = 0.0
        while len(walls) < ANSWER_TOKENS:
            if self.clock is not None:
                self.clock.lap_s()
            begin = time.perf_counter()
            events = engine.step()
            wall_s = time.perf_counter() - begin
            if engine.last_step.num_tokens == batch == len(events):  # one token in and one out for everybody
                total_s += wall_s
                walls.append(wall_s)
                overheads.append(wall_s - (self.clock.lap_s() if self.clock is not None else engine.last_step.run_s))
            elif not engine.has_unfinished:
                raise StropError(f"decode, batch {batch}: the engine never ran all {batch} sequences in one step")
        self._finish()
        self.steps.setdefault(batch, []).append(StepSample(median(walls), median(overheads)))
        return batch * ANSWER_TOKENS / total_s

    def _throughput(self, batch: int) -> float:
        begin = time.perf_counter()
        self._add(batch, PROMPT_TOKENS, ANSWER_TOKENS)
        self._finish()
        return batch * ANSWER_TOKENS / (time.perf_counter() - begin)

    def _add(self, num_prompts: int, prompt_len: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        for i, ids in enumerate(prompts(num_prompts, prompt_len, self.engine.spec.vocab_size, self.seed)):
            self.engine.add(Request(f"bench-{self.seed}-{i}", ids, params))

    def _finish(self) -> None:
        while self.engine.has_unfinished:
            for event in self.engine.step():
                if event.finish_reason == "abort":
                    raise StropError(f"a benchmark request was aborted: {event.stop_reason}")

    def _run_command(self, max_tokens: int) -> list[str]:
        prompt = " time" * (1 if max_tokens == 1 else PROMPT_TOKENS)
        options = ["--raw", "--ignore-eos", "--max-tokens", str(max_tokens), "--threads", str(self.num_threads)]
        options += ["--kv-dtype", self.engine.config.kv_dtype]
        return [*STROP, "run", self.model, prompt, *options]


def first_token(command: list[str], is_token: Callable[[bytes], bool] = bool) -> tuple[float, float, int]:
    """Runs a command: seconds to its first output that is a token, seconds to its end, and peak memory in bytes.

    Raises:
        StropError: it failed, or said nothing.
    """
    begin = time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    first_s, seen = 0.0, b""
    while piece := os.read(process.stdout.fileno(), 65536):
        seen += piece
        if not first_s and is_token(seen):
            first_s = time.perf_counter() - begin
    message = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    if process.returncode != 0 or not first_s:
        tail = " | ".join(message.strip().splitlines()[-3:])
        raise StropError(f"{' '.join(command[:4])} ... ended with {process.returncode} and {len(seen)} bytes: {tail}")
    return first_s, time.perf_counter() - begin, usage.ru_maxrss * 1024


def interleave(
    contenders: list[Contender], workload: Workload, num_rounds: int, lock_directory: Path
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measures the contenders in turn, `num_rounds` times after one round of warm-up.

    Returns values by name, round by round, and the reason for each contender that cannot do this workload.
    """
    values: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for round_number in range(-1, num_rounds):
        for contender in contenders:
            if contender.name in reasons:
                continue
            try:
                with machine_to_ourselves(lock_directory):
                    value = contender.measure(workload)
            except StropError as error:
                reasons[contender.name] = str(error)
                values.pop(contender.name, None)
                continue
            if round_number >= 0:
                values.setdefault(contender.name, []).append(value)
    return values, reasons
