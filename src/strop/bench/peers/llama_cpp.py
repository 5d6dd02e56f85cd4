"""llama.cpp through its own benchmark programs."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from strop.bench.measure import first_token
from strop.bench.peers import Flags, PeerSpec, TopLogprobs
from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, Workload
from strop.core.errors import StropError

_BATCH_TOKENS = 2048
TIMEOUT_S = 900.0
"""An engine that waits for its threads by spinning takes forever beside a busy neighbour."""


class LlamaCpp:
    """One GGUF file under llama-batched-bench, llama-bench and llama-completion."""

    def __init__(self, spec: PeerSpec, model_file: Path, num_threads: int, cache: Path) -> None:
        self._spec, self._num_threads = spec, num_threads
        self._weights = spec.weights or self._quantized(model_file, cache)
        self._described: dict[str, str] = {}

    def describe(self) -> dict[str, str]:
        """The build number and the `system_info` line."""
        if not self._described:
            isa = re.search(r"system_info:.*", _run(self._completion(1)).stderr)
            shown = _run([str(self._spec.programs / "llama-completion"), "--version"])
            version = re.search(r"version: (.*)", shown.stderr + shown.stdout)
            self._described = {
                "version": version.group(1) if version else "unknown",
                "isa": isa.group(0) if isa else "unknown",
                "weights": self._weights.name,
            }
        return self._described

    def measure(self, workload: Workload, flags: Flags) -> float:
        """See Workload."""
        if workload.row in ("decode", "throughput"):
            return self._batched(workload, flags)
        if workload.row == "prefill":
            command = ["-p", str(workload.amount), "-n", "0", "-r", "1", "-o", "json", *_options(flags)]
            return float(json.loads(self._output("llama-bench", command))[0]["avg_ts"])
        first_s, _, peak_rss_bytes = first_token(self._completion(1 if workload.row == "start" else ANSWER_TOKENS))
        return first_s if workload.row == "start" else peak_rss_bytes / 2**20

    def logits(self, windows: np.ndarray, *, one_by_one: bool) -> Iterator[np.ndarray | TopLogprobs]:
        """By llama_logits, which writes float32 logits window after window."""
        program = self._spec.programs / "llama_logits"
        if not program.exists():
            raise StropError(f"{program} is missing: build scripts/llama_logits.cpp against llama.cpp")
        per_call = "1" if one_by_one else str(windows.shape[1])
        with tempfile.NamedTemporaryFile(suffix=".i32") as tokens:
            tokens.write(np.ascontiguousarray(windows, np.int32).tobytes())
            tokens.flush()
            command = [str(program), str(self._weights), tokens.name, "/dev/stdout", per_call, "1", "f16"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                vocab_size = 0
                for _ in windows:
                    if not vocab_size:
                        vocab_size = self._vocab_size()
                    data = process.stdout.read(windows.shape[1] * vocab_size * 4)
                    if len(data) != windows.shape[1] * vocab_size * 4:
                        raise StropError(f"llama_logits ended after {len(data)} bytes of a window's logits")
                    yield np.frombuffer(data, np.float32).reshape(windows.shape[1], vocab_size)

    def close(self) -> None:
        """Nothing is kept running."""

    def _vocab_size(self) -> int:
        from strop.formats.gguf import GGUFCheckpoint

        return len(GGUFCheckpoint(self._weights).metadata["tokenizer.ggml.tokens"])

    def _batched(self, workload: Workload, flags: Flags) -> float:
        batch = workload.amount
        lengths = ["-npp", str(PROMPT_TOKENS), "-ntg", str(ANSWER_TOKENS), "-npl", str(batch)]
        context = ["-c", str(batch * (PROMPT_TOKENS + ANSWER_TOKENS) + 256), "-b", str(_BATCH_TOKENS)]
        output = self._output("llama-batched-bench", [*lengths, *context, "--output-format", "jsonl", *_options(flags)])
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if not lines:
            raise StropError(f"llama-batched-bench printed no result: {output.strip()[-300:]}")
        result = json.loads(lines[-1])
        if workload.row == "decode":
            return float(result["speed_tg"])
        return batch * ANSWER_TOKENS / float(result["t"])

    def _output(self, program: str, options: list[str]) -> str:
        weights = ["-m", str(self._weights), "-t", str(self._num_threads)]
        return _run([str(self._spec.programs / program), *weights, *options]).stdout

    def _completion(self, num_tokens: int) -> list[str]:
        prompt = " time" * (1 if num_tokens == 1 else PROMPT_TOKENS)
        return [
            *(str(self._spec.programs / "llama-completion"), "-m", str(self._weights), "-t", str(self._num_threads)),
            *("-p", prompt, "-n", str(num_tokens), "--ignore-eos", "-no-cnv", "--no-display-prompt", "-c", "512"),
        ]

    def _quantized(self, model_file: Path, cache: Path) -> Path:
        """The model file requantised, made once."""
        kind = self._spec.quantize
        status = model_file.stat()
        identity = f"{model_file.resolve()} {status.st_size} {status.st_mtime_ns}"
        path = (
            cache / f"{model_file.name.split('.')[0]}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.{kind}.gguf"
        )
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            program = self._spec.programs / "llama-quantize"
            command = [str(program), "--allow-requantize", str(model_file), str(partial), kind]
            try:
                _run(command)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return path


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Its output; StropError when it cannot start, fails, or takes longer than any measurement may."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StropError(f"{command[0]} gave no result: {error}"[:500]) from error
    if run.returncode != 0:
        raise StropError(f"{command[0]} ended with {run.returncode}: {run.stderr.strip()[-300:]}")
    return run


def _options(flags: Flags) -> list[str]:
    return [part for name, value in flags.items() for part in (f"-{name}", str(value))]
