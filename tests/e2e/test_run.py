"""`strop run` on good input and bad: an answer, or exit code 1 and one line that says what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import RawTensor
from tiny_llm import tiny_llm

Result = subprocess.CompletedProcess[str]
Strop = Callable[..., Result]
CleanError = Callable[..., None]


def last_json(result: Result) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_an_answer_streamed_and_as_json(strop: Strop, smollm2_path: Path) -> None:
    arguments = ("run", smollm2_path, "Why is it important to drink water?", "--max-tokens", 24)
    streamed = strop(*arguments)
    assert streamed.returncode == 0, streamed.stderr
    assert "water" in streamed.stdout.lower()
    plan, fits, summary = streamed.stderr.splitlines()[-3:]
    assert plan.startswith("memory: weights")
    assert fits.startswith("fits: ")
    assert "tokens/s" in summary
    answer = last_json(strop(*arguments, "--json"))
    assert answer["text"] == streamed.stdout.removesuffix("\n")
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(answer["token_ids"]) <= 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["timings"]["start_to_first_token_s"] > answer["timings"]["ttft_s"] > 0


def test_options_reach_the_engine(strop: Strop, tiny: Path) -> None:
    def ids(*options: object) -> list[int]:
        found: list[int] = last_json(strop("run", tiny, "-", "--json", *options, stdin="hello"))["token_ids"]
        return found

    greedy = ids("--max-tokens", 20, "--ignore-eos")
    assert len(greedy) == 20
    assert ids("--max-tokens", 20, "--ignore-eos", "--threads", 1, "--context", 64) == greedy
    assert ids("--max-tokens", 20, "--ignore-eos", "--raw") != greedy
    sampled = ("--max-tokens", 20, "--ignore-eos", "--temperature", 1.5, "--seed")
    assert ids(*sampled, 1) == ids(*sampled, 1) != ids(*sampled, 2)


def test_without_native_kernels_it_runs_and_says_so(strop: Strop, tiny: Path) -> None:
    result = strop("run", tiny, "hello", "--max-tokens", 4, env={"STROP_NATIVE": "0"})
    assert result.returncode == 0, result.stderr
    assert "without the native kernels" in result.stderr.splitlines()[0]
    assert "dequantised" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ("", (), "empty"),
        ("x" * 300, (), "or raise --context"),
        ("x", ("--max-tokens", 500), "lower --max-tokens"),
        ("x", ("--max-tokens", -1), "--max-tokens -1"),
        ("x", ("--context", 500), "--context 500"),
        ("x", ("--threads", -1), "--threads -1"),
        ("x", ("--memory", 0.01), "does not fit"),
        ("x", ("--memory", "nan"), "--memory"),
    ],
    ids=["empty", "long prompt", "long answer", "no answer", "long context", "threads", "memory", "nan"],
)
def test_impossible_requests(
    strop: Strop, clean_error: CleanError, tiny: Path, prompt: str, options: tuple[object, ...], named: str
) -> None:
    clean_error(strop("run", tiny, prompt, *options), named)


def test_memory_is_refused_before_anything_is_packed(
    strop: Strop, clean_error: CleanError, smollm2_path: Path, tmp_path: Path
) -> None:
    result = strop("run", smollm2_path, "x", "--memory", 0.3, env={"STROP_CACHE": str(tmp_path)})
    clean_error(result, "weights 92 MiB", "limit is 307 MiB", "--memory")
    assert not list(tmp_path.rglob("*.pack"))


def test_odd_surroundings(strop: Strop, clean_error: CleanError, tiny: Path, tmp_path: Path) -> None:
    clean_error(strop("run", tiny, "x", env={"STROP_ISA": "z80"}), "z80")
    clean_error(strop("run", tmp_path / "none.gguf", "x"), "no such file")
    clean_error(strop("run", tmp_path, "x"), "folder")
    not_a_directory = strop("run", tiny, "x", "--max-tokens", 4, env={"STROP_CACHE": str(tiny / "cache")})
    assert not_a_directory.returncode == 0, not_a_directory.stderr
    assert "set STROP_CACHE" in not_a_directory.stderr
    assert "Warning" not in not_a_directory.stderr
    plain = strop("run", tiny, "é", "--max-tokens", 40, "--ignore-eos", env={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0, plain.stderr


def test_standard_input_that_is_not_text(
    start: Callable[..., subprocess.Popen[str]], clean_error: CleanError, tiny: Path
) -> None:
    with start("run", tiny, "-") as process:
        process.stdin.buffer.write(b"hello \xff")  # type: ignore[union-attr]
        out, err = process.communicate(timeout=60)
    clean_error(Result((), process.returncode, out, err), "not UTF-8")


def test_a_reader_that_leaves(start: Callable[..., subprocess.Popen[str]], smollm2_path: Path) -> None:
    with start("run", smollm2_path, "Tell a long story.", "--max-tokens", 400) as process:
        process.stdout.read(1)  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        err = process.stderr.read()  # type: ignore[union-attr]
        assert process.wait(60) != 0
    assert "Traceback" not in err


def test_an_interrupt(start: Callable[..., subprocess.Popen[str]], smollm2_path: Path) -> None:
    with start("run", smollm2_path, "Tell a long story.", "--max-tokens", 4000, "--ignore-eos") as process:
        process.stdout.read(1)  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGSEGV)
    assert "Traceback" not in err


# Many damaged files: one process imports everything once, then forks a child for each.
_FORK_SERVER = """
import os, sys, traceback
import jax, strop.cli.run, strop.engine.engine, strop.models.load
from strop.cli.verb import run_verb
for line in sys.stdin:
    path, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
        try:
            run_verb(strop.cli.run.command, [path, "hello", "--max-tokens", "4"])
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def run_damaged(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """run_damaged(bytes) -> (exit code, or minus the signal; standard error)."""
    folder = tmp_path_factory.mktemp("damaged")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _FORK_SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(content: bytes) -> tuple[int, str]:
            path, errors = folder / "damaged.gguf", folder / "stderr"
            path.write_bytes(content)
            errors.unlink(missing_ok=True)
            server.stdin.write(f"{path}\t{errors}\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            status = int(server.stdout.readline())  # type: ignore[union-attr]
            return os.waitstatus_to_exitcode(status), errors.read_text()

        yield run
        server.stdin.close()  # type: ignore[union-attr]


def refused_cleanly(code: int, stderr: str, *named: str) -> bool:
    lines = [line for line in stderr.splitlines() if not line.startswith(("memory:", "fits:"))]
    return code == 1 and len(lines) == 1 and lines[0].startswith("strop: ") and all(name in lines[0] for name in named)


def test_flipped_weight_bits(run_damaged: Callable[..., Any]) -> None:
    model = tiny_llm()
    content = model.build()
    begin = len(content) - sum(-(-len(tensor.data) // 32) * 32 for tensor in model.tensors)
    rng = np.random.default_rng(6)
    codes = []
    for _ in range(50):
        damaged = bytearray(content)
        damaged[rng.integers(begin, len(content))] ^= 1 << rng.integers(8)
        code, stderr = run_damaged(bytes(damaged))
        assert code == 0 or refused_cleanly(code, stderr), (code, stderr)
        codes.append(code)
    assert codes.count(0) > 25


def test_infinite_scales_are_refused(run_damaged: Callable[..., Any]) -> None:
    model = tiny_llm()
    for tensor in model.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            tensor.data = tensor.data[:20] + np.float16(np.inf).tobytes() + tensor.data[22:]
    assert refused_cleanly(*run_damaged(model.build()), "blk.1.ffn_down.weight", "NaN or infinity")


def test_weights_that_overflow_end_the_answer(run_damaged: Callable[..., Any]) -> None:
    """Finite in the file, infinite in the network: the answer ends with a reason, not with made-up tokens."""
    model = tiny_llm()
    for tensor in model.tensors:
        if tensor.name.endswith("attn_norm.weight"):
            tensor.data = np.full(64, 3e38, np.float32).tobytes()
    code, stderr = run_damaged(model.build())
    assert refused_cleanly(code, stderr, "NaN")


def test_damaged_headers(run_damaged: Callable[..., Any]) -> None:
    model = tiny_llm()
    content = model.build()
    begin = len(content) - sum(-(-len(tensor.data) // 32) * 32 for tensor in model.tensors)
    rng = np.random.default_rng(7)
    for length in (0, 3, 4, 20, 100, begin // 2, begin, begin + 1000, len(content) - 40):
        assert refused_cleanly(*run_damaged(content[:length])), length
    num_refused = 0
    for _ in range(25):
        damaged = bytearray(content)
        place = int(rng.choice([rng.integers(0, 300), rng.integers(0, begin), rng.integers(begin - 900, begin)]))
        damaged[place] ^= 1 << rng.integers(8)
        code, stderr = run_damaged(bytes(damaged))
        assert code == 0 or refused_cleanly(code, stderr), (place, code, stderr)
        num_refused += code != 0
    assert num_refused > 5


def test_wrong_tensors(run_damaged: Callable[..., Any]) -> None:
    def with_first(**changes: Any) -> bytes:
        model = tiny_llm()
        first: RawTensor = model.tensors[0]
        for name, item in changes.items():
            setattr(first, name, item)
        return model.build()

    assert refused_cleanly(*run_damaged(with_first(type_id=12)), "Q4_K")
    assert refused_cleanly(*run_damaged(with_first(type_id=999)), "999")
    assert refused_cleanly(*run_damaged(with_first(name="surprise.weight")), "token_embd")
    assert refused_cleanly(*run_damaged(with_first(shape=(134, 128))), "token_embd")
    assert refused_cleanly(*run_damaged(with_first(offset=1 << 50)), "token_embd")


# The pack cache under a real command.


def test_full_disk_while_packing(strop: Strop, clean_error: CleanError, smollm2_path: Path, tmp_path: Path) -> None:
    small_files = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))"
    result = strop("run", smollm2_path, "x", env={"STROP_CACHE": str(tmp_path)}, before=small_files)
    clean_error(result, str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pack", ".part")]


def test_full_disk_on_a_small_file_system(
    strop: Strop, clean_error: CleanError, smollm2_path: Path, tmp_path: Path
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs rights this process lacks")
    try:
        clean_error(strop("run", smollm2_path, "x", env={"STROP_CACHE": str(tmp_path)}), str(tmp_path))
        assert not list(tmp_path.rglob("*.p*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)


def test_two_cold_starts_at_once(
    start: Callable[..., subprocess.Popen[str]], smollm2_path: Path, tmp_path: Path
) -> None:
    arguments = ("run", smollm2_path, "Hello", "--max-tokens", 4, "--json")
    processes = [start(*arguments, env={"STROP_CACHE": str(tmp_path)}) for _ in range(2)]
    answers = []
    for process in processes:
        with process:
            out, err = process.communicate(timeout=300)
        answers.append(last_json(Result((), process.returncode, out, err))["token_ids"])
    assert answers[0] == answers[1]
    assert len(list(tmp_path.rglob("*.pack"))) == 1


def test_kill_while_packing(
    start: Callable[..., subprocess.Popen[str]], strop: Strop, smollm2_path: Path, tmp_path: Path
) -> None:
    environment = {"STROP_CACHE": str(tmp_path)}
    with start("run", smollm2_path, "Hello", env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.part")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.communicate()
    assert not list(tmp_path.rglob("*.pack")), "it was packed before the kill"
    assert last_json(strop("run", smollm2_path, "Hello", "--max-tokens", 4, "--json", env=environment))["text"]
    assert not list(tmp_path.rglob("*.part"))
