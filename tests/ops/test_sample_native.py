"""The sampling kernel alone, compiled here per instruction set, against its reference on random cases."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from strop.ops.sample import SampleInputs, SampleOutputs, reference

NATIVE = Path(__file__).parents[2] / "native"
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
}
POINTERS = ("logits", *SampleInputs._fields, *SampleOutputs._fields)

sample = jax.jit(reference.sample, static_argnames=("num_top",))


class SampleArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("vocab_size", "num_edits", "mask_words", "num_top")),
    )


def runs_here(isa: str) -> bool:
    if isa == "baseline":
        return True
    cpu_info = Path("/proc/cpuinfo")
    words = set(cpu_info.read_text().split()) if platform.machine() == "x86_64" and cpu_info.exists() else set()
    return {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}[isa] <= words


@pytest.fixture(scope="module", params=FLAGS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or not runs_here(request.param):
        pytest.skip(f"no g++, or this machine does not run {request.param}")
    path = tmp_path_factory.mktemp("sample") / f"{request.param}.so"
    common = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", f"-I{NATIVE}"]
    source = str(NATIVE / "tests" / "sample_test.cpp")
    subprocess.run([compiler, *common, *FLAGS[request.param], source, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def run_native(library: ctypes.CDLL, logits: np.ndarray, inputs: SampleInputs, num_top: int) -> SampleOutputs:
    num_rows, vocab_size = logits.shape
    out = SampleOutputs(
        np.full(num_rows, -9, np.int32),
        np.full(num_rows, -9, np.float32),
        np.full((num_rows, num_top), -9, np.int32),
        np.full((num_rows, num_top), -9, np.float32),
    )
    arrays = (logits, *inputs, *out)
    assert all(array.flags.c_contiguous for array in arrays)
    sizes = (vocab_size, len(inputs.edit_row), inputs.allowed.shape[1], num_top)
    args = SampleArgs(*(array.ctypes.data for array in arrays), *sizes)
    middle = num_rows // 2  # as two callers would share the rows
    library.sample_test_rows(ctypes.byref(args), middle, num_rows)
    library.sample_test_rows(ctypes.byref(args), 0, middle)
    return out


def random_masks(rng: np.random.Generator, num_rows: int, vocab_size: int) -> np.ndarray:
    """Rows that allow all, most, few, one or none."""
    share = rng.choice([1, 0.9, 0.01, 0], (num_rows, 1))
    bits = rng.random((num_rows, vocab_size + -vocab_size % 32)) < share
    bits[np.arange(num_rows), rng.integers(0, vocab_size, num_rows)] |= rng.random(num_rows) < 0.9
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def random_case(rng: np.random.Generator, num_rows: int, vocab_size: int, num_edits: int, masked: bool = False):
    """Logits of several shapes (peaked, flat, tied) under every mixture of parameters."""
    spread = rng.choice([0.0, 0.3, 2.0, 5.0], (num_rows, 1))
    logits = (rng.standard_normal((num_rows, vocab_size)) * spread).astype(np.float32)
    tied = rng.random(num_rows) < 0.3
    logits[tied] = np.round(logits[tied])
    logits[rng.random(logits.shape) < 0.01] = -np.inf
    floats = np.stack(
        [
            rng.choice([0, 0.3, 1, 1, 1.7], num_rows),
            rng.choice([1, 1, 0.999, 0.9, 0.5, 1e-4], num_rows),
            rng.choice([0, 0, 0.05, 0.5, 1], num_rows),
            rng.choice([1, 1.3, 0.8], num_rows),
            rng.choice([0, 0.5, -0.5], num_rows),
            rng.choice([0, 0.25, -0.25], num_rows),
        ],
        axis=1,
    ).astype(np.float32)
    ints = rng.integers(0, 2**32, (num_rows, 4), dtype=np.uint32)
    choices = [0, 0, 1, 2, 40, vocab_size // 3, vocab_size - 1, vocab_size, 2**32 - 1]
    ints[:, 0] = rng.choice(np.array(choices, np.uint32), num_rows)
    pairs = np.sort(rng.permutation(num_rows * vocab_size)[:num_edits])
    count = rng.integers(0, 3, len(pairs)).astype(np.int32)
    bias = rng.choice([0, 0, 2, -np.inf], len(pairs)).astype(np.float32)

    def pad(values: np.ndarray, padding: int = 0) -> np.ndarray:
        return np.concatenate([values, np.full(5, padding)]).astype(values.dtype)

    inputs = SampleInputs(
        floats,
        ints,
        pad((pairs // vocab_size).astype(np.int32), -1),
        pad((pairs % vocab_size).astype(np.int32)),
        pad(count),
        pad(((count > 0) | (rng.random(len(pairs)) < 0.5)).astype(np.int32)),
        pad(bias),
        *([random_masks(rng, num_rows, vocab_size)] if masked else []),
    )
    return logits, inputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("vocab_size", "num_edits"), [(1, 0), (7, 9), (63, 20), (64, 0), (200, 300), (5000, 4000)])
def test_native_equals_the_reference(library: ctypes.CDLL, vocab_size: int, num_edits: int, masked: bool) -> None:
    rng = np.random.default_rng(vocab_size)
    num_rows, num_top = 150, 5
    differing = 0
    for _ in range(3):
        logits, inputs = random_case(rng, num_rows, vocab_size, num_edits, masked)
        expected = sample(logits, inputs, num_top=num_top)
        got = run_native(library, logits, inputs, num_top)
        np.testing.assert_array_equal(got.top_ids, expected.top_ids)
        np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, rtol=2e-6, atol=3e-6)
        greedy = inputs.floats[:, 0] == 0
        np.testing.assert_array_equal(got.token_ids[greedy], np.asarray(expected.token_ids)[greedy])
        same = got.token_ids == np.asarray(expected.token_ids)
        differing += int(np.sum(~same))
        np.testing.assert_allclose(got.logprobs[same], np.asarray(expected.logprobs)[same], rtol=2e-6, atol=3e-6)
        without = run_native(library, logits, inputs, 0)
        np.testing.assert_array_equal(without.token_ids, got.token_ids)
        assert not np.any(without.logprobs)
    assert differing <= 1  # log and the mass at a top-p boundary may round differently


def test_native_greedy_and_bad_rows(library: ctypes.CDLL) -> None:
    nan, inf = np.nan, np.inf
    largest = np.finfo(np.float32).max
    rows = [
        [1, nan, 3],
        [-inf] * 3,
        [1, 2, 30],
        [nan] * 3,
        [0, inf, 5],
        [largest, inf, 0],
        [-0.0, 0, -1],
        [-inf, -5, -5],
    ]
    expected = [-1, -1, 2, -1, 1, 0, 0, 1]
    for vocab_size in (3, 64, 131):
        for offset in (0, vocab_size - 3):
            logits = np.full((len(rows), vocab_size), -inf, np.float32)
            logits[:, offset : offset + 3] = rows
            wanted = np.array([token if token < 0 else token + offset for token in expected])
            ids = np.empty(len(rows), np.int32)
            pointers = (ctypes.c_void_p(logits.ctypes.data), vocab_size, ctypes.c_void_p(ids.ctypes.data))
            library.sample_test_greedy(*pointers, 0, len(rows))
            np.testing.assert_array_equal(ids, wanted)
            np.testing.assert_array_equal(reference.greedy(logits), wanted)
            for temperature in (0.0, 0.01):
                none = np.zeros(0, np.int32)
                floats = np.tile(np.float32([temperature, 1, 0, 1, 0, 0]), (len(rows), 1))
                ints = np.zeros((len(rows), 4), np.uint32)
                ints[:, 0] = 1  # of several equal ones, top-k keeps the first
                inputs = SampleInputs(floats, ints, none, none, none, none, none.astype(np.float32))
                np.testing.assert_array_equal(run_native(library, logits, inputs, 2).token_ids, wanted)


def test_native_draws_do_not_depend_on_company(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(5)
    logits, inputs = random_case(rng, 60, 1000, 2000, masked=True)
    together = run_native(library, logits, inputs, 3)
    for row in range(0, 60, 7):
        mine = inputs.edit_row == row
        edits = [np.ascontiguousarray(a[mine]) for a in inputs[2:7]]
        edits[0] = np.zeros_like(edits[0])
        own = slice(row, row + 1)
        alone = SampleInputs(inputs.floats[own], inputs.ints[own], *edits, inputs.allowed[own])
        result = run_native(library, logits[row : row + 1], alone, 3)
        for ours, theirs in zip(result, together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])  # bit for bit
