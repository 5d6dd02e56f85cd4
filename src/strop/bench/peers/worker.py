"""A peer that is a Python package: it runs in its own interpreter and answers one line of JSON per line of JSON."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from strop.bench.measure import first_token
from strop.bench.peers import Flags, PeerSpec, TopLogprobs
from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, Workload
from strop.core.errors import StropError

_SERVER = Path(__file__).with_name("worker_main.py")


class WorkerPeer:
    """Keeps one process for the flags in use; stopped (SIGSTOP) while others are measured, so that it cannot spin."""

    def __init__(self, spec: PeerSpec, num_threads: int) -> None:
        self._spec, self._num_threads = spec, num_threads
        self._process: subprocess.Popen[str] | None = None
        self._flags: Flags | None = None
        self._described: dict[str, str] = {}
        self._seed = 0

    def describe(self) -> dict[str, str]:
        """What the worker said of itself when it started."""
        if not self._described:
            self._start(self._spec.candidates("decode")[0])
        return self._described

    def measure(self, workload: Workload, flags: Flags) -> float:
        """See Workload. "decode" is a run of 1 + ANSWER_TOKENS tokens less the time of a run of one token."""
        if workload.row in ("start", "rss"):
            self.close()
            num_tokens = 1 if workload.row == "start" else ANSWER_TOKENS
            command = [*self._command(flags), "--once", str(num_tokens)]
            first_s, _, peak_rss_bytes = first_token(
                ["env", *(f"{k}={v}" for k, v in self._environment().items()), *command],
                lambda seen: b"token\n" in seen,
            )
            return first_s if workload.row == "start" else peak_rss_bytes / 2**20
        self._start(flags)
        if workload.row == "prefill":
            return workload.amount / self._generate(1, workload.amount, 1)
        batch = workload.amount
        if workload.row == "throughput":
            return batch * ANSWER_TOKENS / self._generate(batch, PROMPT_TOKENS, ANSWER_TOKENS)
        whole_s = self._generate(batch, PROMPT_TOKENS, ANSWER_TOKENS + 1)
        return batch * ANSWER_TOKENS / max(whole_s - self._generate(batch, PROMPT_TOKENS, 1), 1e-9)

    def logits(self, windows: np.ndarray, *, one_by_one: bool) -> Iterator[np.ndarray | TopLogprobs]:
        """All logits, or the most probable tokens where the engine gives no more."""
        if one_by_one:
            raise StropError(f"{self._spec.name} takes no part: it cannot be told which token it generated")
        self._start(self._spec.candidates("fidelity")[0])
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "window.npz"
            for window in windows:
                self._ask({"do": "logits", "tokens": window.tolist(), "path": str(path)})
                with np.load(path, allow_pickle=False) as arrays:
                    if "logits" in arrays:
                        yield arrays["logits"]
                    else:
                        yield TopLogprobs(arrays["token_ids"], arrays["logprobs"])

    def close(self) -> None:
        """Ends the process."""
        process, self._process, self._flags = self._process, None, None
        if process is not None:
            _signal(process, signal.SIGCONT)
            _signal(process, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _start(self, flags: Flags) -> None:
        if self._process is not None and self._flags == flags:
            return
        self.close()
        self._process = subprocess.Popen(
            self._command(flags),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | self._environment(),
            start_new_session=True,  # a group of its own, to be stopped as one
        )
        self._flags = flags
        self._described = {key: str(value) for key, value in self._answer().items()}
        _signal(self._process, signal.SIGSTOP)

    def _command(self, flags: Flags) -> list[str]:
        settings = {"weights": str(self._spec.weights), "num_threads": self._num_threads, "flags": flags}
        return [str(self._spec.programs / "python"), str(_SERVER), self._spec.module, json.dumps(settings)]

    def _environment(self) -> dict[str, str]:
        threads = str(self._num_threads)
        return {"OMP_NUM_THREADS": threads, "PYTHONPATH": "", **self._spec.environment}

    def _generate(self, num_prompts: int, prompt_len: int, num_tokens: int) -> float:
        self._seed += 1
        return float(
            self._ask(
                {
                    "do": "generate",
                    "num_prompts": num_prompts,
                    "prompt_len": prompt_len,
                    "num_tokens": num_tokens,
                    "seed": self._seed,
                }
            )["seconds"]
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        _signal(process, signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return self._answer()
        except BrokenPipeError as error:
            raise StropError(f"{self._spec.name} ended") from error
        finally:
            _signal(process, signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            command = " ".join(self._command({})[:3])
            raise StropError(f"{self._spec.name} ended without an answer: run `{command} ...` by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StropError(f"{self._spec.name}: {answer['error']}")
        return answer


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
