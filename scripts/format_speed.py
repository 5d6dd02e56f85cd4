"""Times linear layers of the packed formats, all in one run: CPU time of one thread, in rounds over all formats, so
that a busy host hits each alike. Every product reads another matrix of a stack that the caches do not hold.

    python scripts/format_speed.py [--rows 1,16,512] [--shape 2048x2048] [--rounds 15] [FORMAT ...]

Prints microseconds a matrix (median and least of the rounds), the median of the ratios to the first format within a
round, and what one core reads of weights in the least time.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from strop.formats.values import GroupQuantized, TensorValue, TwoLevelScale
from strop.models.packing import pack, packed_bytes
from strop.ops import native
from strop.ops.bound import BoundProgram, bind_native
from strop.ops.linear import linear
from strop.ops.weights import PACKED_FORMATS, Weight

STACK_BYTES = 128 << 20


def random_value(format_name: str, num_rows: int, k_len: int) -> TensorValue:
    rng, packed = np.random.default_rng(0), PACKED_FORMATS[format_name]
    if not packed.quantized:
        raise SystemExit(f"{format_name}: not a quantised format; those are q4, q5 and q8")
    scale: np.ndarray | TwoLevelScale = rng.random((num_rows, k_len // 32)).astype(np.float16)
    if packed.two_level:
        local = rng.integers(0, 32, (num_rows, k_len // 32), np.uint8)
        local = local if packed.has_offset else local.view(np.int8)
        scale = TwoLevelScale(rng.random((num_rows, k_len // 256)).astype(np.float16), local)
    codes = rng.integers(0, 1 << packed.bits, (num_rows, k_len), np.uint8)
    return GroupQuantized(codes, scale, scale if packed.has_offset else None, packed.zero, packed.bits)


def program(
    format_name: str, shape: tuple[int, int], num_rows: int
) -> tuple[BoundProgram, tuple[np.ndarray, np.ndarray], int]:
    """A program of one product per matrix of a stack, its arguments, and how many matrices there are."""
    num_bytes = packed_bytes(format_name, *shape)
    num_matrices = max(2, STACK_BYTES // num_bytes // (1 if num_rows < 64 else 8))
    stack = np.empty((num_matrices, num_bytes), np.uint8)
    pack([random_value(format_name, *shape)], format_name, stack[0])
    stack[1:] = stack[0]
    weight = Weight(jnp.asarray(stack), format_name, shape)

    def run(kept: Weight, x: np.ndarray, counts: np.ndarray) -> tuple[object]:
        for index in range(num_matrices):
            y = linear(x, kept, index, counts, platform="native")  # type: ignore[arg-type]
        return (y,)

    x = np.random.default_rng(1).standard_normal((num_rows, shape[1])).astype(np.float32)
    arguments = x, np.array([num_rows, 0], np.int32)
    bound = bind_native(native.library(), run, weight, *arguments)  # type: ignore[arg-type]
    assert bound is not None
    return bound, arguments, num_matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=["q4_offset", "q4_two_level", "q5", "q5_two_level", "q8"])
    parser.add_argument("--rows", default="1,16,512")
    parser.add_argument("--shape", default="2048x2048", help="N x K of W")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    native.register()
    native.set_num_threads(1)
    print(f"{native.isa()}, one thread, W [{args.shape}]")
    num_columns, k_len = map(int, args.shape.split("x"))
    for num_rows in map(int, args.rows.split(",")):
        programs = {name: program(name, (num_columns, k_len), num_rows) for name in args.formats}
        times: dict[str, list[float]] = {name: [] for name in args.formats}
        for _ in range(args.rounds + 1):
            for name, (bound, arguments, num_matrices) in programs.items():
                start = time.thread_time()
                bound(*arguments)
                times[name].append((time.thread_time() - start) / num_matrices)
        first = np.array(times[args.formats[0]][1:])
        for name, all_rounds in times.items():
            rounds = np.array(all_rounds[1:])
            bandwidth = packed_bytes(name, num_columns, k_len) / rounds.min() / 1e9
            print(
                f"M {num_rows:4} {name:14} {np.median(rounds) * 1e6:8.0f} us ({rounds.min() * 1e6:.0f}),"
                f" ratio {np.median(rounds / first):.2f}, {bandwidth:5.1f} GB/s"
            )


if __name__ == "__main__":
    main()
