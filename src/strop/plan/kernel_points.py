"""The points of a calibration: real operations on made-up numbers, bound as an engine's step binds them."""

import ctypes
import mmap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from strop.core.config import KvDtype
from strop.machine.profile import Curve, PageTimes, Sized
from strop.ops.attention import AttentionOperands, Rows, attention, new_cache
from strop.ops.bound import bind_native
from strop.ops.embed import embed
from strop.ops.linear import linear
from strop.ops.norm import Norm, add_norm
from strop.ops.sample import ALL_ALLOWED, NUM_FLOATS, NUM_INTS, SampleInputs
from strop.ops.sample.op import greedy, sample
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS, Weight

_FILL = 0x3C
"""Every byte of the weights: finite and above 0 in all types. Zeros would lie in one page of memory, all of them."""
_STACK_BYTES = 96 << 20
_BLOCK_LEN = 32
_MAX_ROWS = 512
_PREPARED_DIM = 2048
"""Width of the rows whose preparation is measured."""
_LONG_RUN_S = 4e-3
"""Longer runs are made shorter, as rounds matter more."""
_WARM_ROWS = 12
"""From so many rows on, products bind, and it does not matter where weights come from."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Which points are measured."""

    seconds: float
    formats: tuple[str, ...]
    products: dict[int, tuple[int, ...]]
    """By rows and columns of square matrices: of how many rows a product is measured."""
    page_rows: tuple[int, ...]
    head_dims: tuple[int, ...]
    kv_dtypes: tuple[KvDtype, ...]
    bandwidth_bytes: tuple[int, ...]
    batches: tuple[int, ...]


def allocate(num_bytes: int) -> np.ndarray:
    """uint8 in pages of 2 MiB where the system grants them, like packed weights; every page is its own."""
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, np.uint8)
    memory[:] = _FILL
    return memory


class KernelPoints:
    """The points of an extent, and what their times mean."""

    def __init__(self, library: ctypes.CDLL, extent: Extent, num_threads: int) -> None:
        self._library, self._extent, self._num_threads = library, extent, num_threads
        self.memory = allocate(_STACK_BYTES)
        rng = np.random.default_rng(0)
        self._numbers = rng.standard_normal(_MAX_ROWS * max(extent.products)).astype(np.float32)
        self._units: dict[Any, float] = {}
        """Operations of a point's run."""

    def points(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        """Each by its name."""
        extent = self._extent
        for name in extent.formats:
            for dim, rows in extent.products.items():
                yield from self._linear(name, dim, rows)
        yield from self._prepare()
        yield from self._small()
        for kv_dtype in extent.kv_dtypes:
            for head_dim in extent.head_dims:
                for num_rows in extent.page_rows:
                    yield from self._pages(kv_dtype, head_dim, num_rows)
        yield from self._enter()
        for name in extent.formats:
            yield from self._embed(name)
        yield from self._norm()
        yield from self._picking()

    def figures(self, times: dict[Any, float]) -> dict[str, Any]:
        """The fields of MachineProfile that points give."""
        each = {name: times[name] / self._units[name] for name in times}
        extent, rows = self._extent, self._extent.products[_PREPARED_DIM]
        prepared = extent.formats[0] if "q8" not in extent.formats else "q8"
        prepare_s = []
        for num_rows in rows:  # of 16 columns the product is one thread's
            product_s = each["linear", prepared, _PREPARED_DIM, num_rows, "cold"]
            product_s *= TILE_COLUMNS / _PREPARED_DIM * self._num_threads
            prepare_s.append(
                max(each["prepare", num_rows] - product_s, 0.1 * each["prepare", num_rows]) / _PREPARED_DIM
            )
        prepare = _curve(rows, prepare_s)
        call_s = each["call", 0]

        def sized(name: str, dim: int) -> Sized:
            curves, rows = [], extent.products[dim]
            for where in ("cold", "warm"):
                found = [each["linear", name, dim, num_rows, _where(where, num_rows)] for num_rows in rows]
                net = [max(s - prepare.at(m) * dim, 0.5 * s) for m, s in zip(rows, found, strict=True)]
                curves.append(_curve(rows, net))
            return Sized(dim * dim, *curves)

        return {
            "linear": {name: tuple(sized(name, dim) for dim in extent.products) for name in extent.formats},
            "prepare_s": prepare,
            "call_s": call_s,
            "gate_s": max(0.0, each["gate", True] - each["gate", False]),
            "attention": {
                kv_dtype: tuple(self._page_times(each, kv_dtype, head_dim) for head_dim in extent.head_dims)
                for kv_dtype in extent.kv_dtypes
            },
            "enter_s": each["enter", 0],
            "embed_s": {name: each["embed", name] for name in extent.formats},
            "norm_s": each["norm", 0],
            "greedy_s": each["greedy", 0],
            "sample_s": each["sample", 0],
        }

    def _page_times(self, each: dict[Any, float], kv_dtype: KvDtype, head_dim: int) -> PageTimes:
        rows = self._extent.page_rows
        cold, warm = (_curve(rows, [each["page", kv_dtype, head_dim, n, w] for n in rows]) for w in ("cold", "warm"))
        return PageTimes(head_dim, cold, warm)

    def _bind(self, function: Callable[..., Any], kept: Sequence[Any], *args: Any) -> Callable[..., Any]:
        bound = bind_native(self._library, function, kept, *args)
        assert bound is not None, "calibration runs native operations alone"
        return bound

    def _product(self, name: str, shape: tuple[int, int], indices: Sequence[int], gated: bool = False) -> "_Product":
        """A program of products with the matrices of a stack, one after the other."""
        packed_bytes = shape[0] // TILE_COLUMNS * PACKED_FORMATS[name].tile_bytes(shape[1])
        num_matrices = max(indices) + 1
        num_stacks = max(1, len(self.memory) // (num_matrices * packed_bytes))
        flat = self.memory[: num_stacks * num_matrices * packed_bytes]
        stacks = list(flat.reshape(num_stacks, num_matrices, packed_bytes))
        x = self._numbers[: _MAX_ROWS * shape[1]].reshape(_MAX_ROWS, shape[1])
        counts = np.zeros(2, np.int32)

        def products(kept: list[jax.Array], x: jax.Array, counts: jax.Array, stack: jax.Array) -> list[jax.Array]:
            norm, weight = Norm("rms", kept[0], None, 1e-6), Weight(stack, name, shape)
            fused: Any = {"activation": "silu" if gated else None, "gated": gated}
            return [linear(x, weight, i, counts, platform="native", norm=norm, **fused) for i in indices][-1:]

        weight = np.ones((1, shape[1]), np.float32)
        return _Product(self._bind(products, [weight], x, counts, stacks[0]), x, counts, stacks, len(indices))

    def _linear(self, name: str, dim: int, rows: Sequence[int]) -> Iterable[tuple[Any, Callable[[], object]]]:
        shape = dim, dim
        packed_bytes = dim // TILE_COLUMNS * PACKED_FORMATS[name].tile_bytes(dim)
        few = self._product(name, shape, range(min(_calls_of(dim), len(self.memory) // packed_bytes)))
        many = self._product(name, shape, range(max(1, 4 * 512**2 // dim**2)))
        warm = self._product(name, shape, [0] * _calls_of(dim))
        for num_rows in rows:
            product = few if num_rows < _WARM_ROWS else many
            yield self._sized(("linear", name, dim, num_rows, "cold"), product, num_rows)
            if num_rows < _WARM_ROWS:
                yield self._sized(("linear", name, dim, num_rows, "warm"), warm, num_rows, len(warm.stacks))

    def _sized(self, name: Any, product: "_Product", num_rows: int, step: int = 1) -> tuple[Any, Callable[[], object]]:
        """A point of as many runs of a program as take some milliseconds."""
        begin = time.perf_counter()
        product.run(num_rows, 0)
        product.run(num_rows, 0)
        once_s = (time.perf_counter() - begin) / 2
        num_runs = max(1, min(len(product.stacks), int(_LONG_RUN_S / 2 / once_s)))
        self._units[name] = num_runs * product.num_calls
        at = 0

        def run() -> None:
            nonlocal at
            for _ in range(num_runs):
                product.run(num_rows, at)
                at = (at + step) % len(product.stacks)

        return name, run

    def _prepare(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        name = "q8" if "q8" in self._extent.formats else self._extent.formats[0]
        product = self._product(name, (TILE_COLUMNS, _PREPARED_DIM), [0] * 4)
        for num_rows in self._extent.products[_PREPARED_DIM]:
            yield self._sized(("prepare", num_rows), product, num_rows, len(product.stacks))

    def _small(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        name = self._extent.formats[0]
        product = self._product(name, (16 * TILE_COLUMNS, 256), [0] * 32)
        yield self._sized(("call", 0), product, 1, len(product.stacks))
        for gated in (False, True):
            product = self._product(name, (2048, 256), [0] * 8, gated)
            key, run = self._sized(("gate", gated), product, 16, len(product.stacks))
            self._units[key] *= 16 * 2048
            yield key, run

    def _pages(self, kv_dtype: KvDtype, head_dim: int, num_rows: int) -> Iterable[tuple[Any, Callable[[], object]]]:
        """Sequences of one new token each; the rows that share a page are a group's queries."""
        context_len, num_kv_heads = 1024, 2
        num_pages = context_len // _BLOCK_LEN
        for where, num_seqs, num_layers in (("cold", 8, 12 * 64 // head_dim), ("warm", 4, 1)):
            heads = num_rows * num_kv_heads, num_kv_heads, head_dim
            cache = new_cache(
                "native", num_layers, num_seqs * num_pages, num_kv_heads, head_dim, _BLOCK_LEN, kv_dtype=kv_dtype
            )
            fill(cache)
            rows = _last_tokens(num_seqs, context_len)
            layers = [i % num_layers for i in range(12)]
            key = "page", kv_dtype, head_dim, num_rows, where
            self._units[key] = num_seqs * num_kv_heads * num_pages * len(layers)
            yield key, self._attention(heads, cache, rows, layers, kv_dtype)

    def _enter(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        """A prompt of which each token sees itself alone."""
        heads = 16, 4, 64
        num_tokens = 256
        cache = new_cache("native", 1, num_tokens // _BLOCK_LEN, 4, 64, _BLOCK_LEN)
        fill(cache)
        places = np.arange(num_tokens, dtype=np.int32)
        fields = np.stack([places, places, places, 0 * places, places + 1, 0 * places])
        tables = np.arange(num_tokens // _BLOCK_LEN, dtype=np.int32)[None]
        rows = Rows(fields, tables, np.array([num_tokens, 0], np.int32))  # type: ignore[arg-type]
        self._units["enter", 0] = 4 * num_tokens * (16 + 2 * 4) * 64
        yield ("enter", 0), self._attention(heads, cache, rows, [0] * 4, "bf16", window_len=1, with_rope=True)

    def _attention(
        self, heads: tuple[int, int, int], cache: jax.Array, rows: Rows, layers: Sequence[int], kv_dtype: KvDtype,
        window_len: int | None = None, with_rope: bool = False,
    ) -> Callable[[], object]:  # fmt: skip
        num_heads, num_kv_heads, head_dim = heads
        num_rows, width = rows.fields.shape[1], (num_heads + 2 * num_kv_heads) * head_dim
        qkv = np.resize(self._numbers, (num_rows, width))
        angles = np.ones((num_rows, head_dim // 2), np.float32)

        def attend(kept: list[jax.Array], qkv: jax.Array, cache: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
            operands = AttentionOperands((kept[0], kept[0]) if with_rope else None)
            attended = qkv
            for layer in layers:
                attended, cache = attention(
                    qkv, cache, layer, Rows(*rows), operands, num_heads=num_heads, num_kv_heads=num_kv_heads,
                    head_dim=head_dim, scale=head_dim**-0.5, block_len=_BLOCK_LEN, platform="native",
                    window_len=window_len, kv_dtype=kv_dtype,
                )  # fmt: skip
            return attended, cache

        bound = self._bind(attend, [angles], qkv, cache, *rows)
        return lambda: bound(qkv, cache, *rows)

    def _embed(self, name: str) -> Iterable[tuple[Any, Callable[[], object]]]:
        num_rows, shape = 64, (1024, 1024)
        packed_bytes = shape[0] // TILE_COLUMNS * PACKED_FORMATS[name].tile_bytes(shape[1])
        table = self.memory[:packed_bytes].reshape(1, packed_bytes)
        tokens = np.random.default_rng(0).integers(shape[0], size=num_rows).astype(np.int32)
        counts = np.array([num_rows, 0], np.int32)

        def look_up(kept: list[jax.Array], tokens: jax.Array, counts: jax.Array) -> list[jax.Array]:
            return [embed(tokens, Weight(kept[0], name, shape), counts, platform="native")]

        bound = self._bind(look_up, [table], tokens, counts)
        self._units["embed", name] = num_rows * shape[1]
        yield ("embed", name), lambda: bound(tokens, counts)

    def _norm(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        num_rows, dim = 64, 2048
        x = self._numbers[: num_rows * dim].reshape(num_rows, dim)
        counts = np.array([num_rows, 0], np.int32)

        def normalise(kept: list[jax.Array], x: jax.Array, counts: jax.Array) -> list[jax.Array]:
            return [add_norm(x, Norm("rms", kept[0], None, 1e-6), counts, platform="native", residual=x)]

        bound = self._bind(normalise, [np.ones((1, dim), np.float32)], x, counts)
        self._units["norm", 0] = num_rows * dim
        yield ("norm", 0), lambda: bound(x, counts)

    def _picking(self) -> Iterable[tuple[Any, Callable[[], object]]]:
        """A row for each thread, as each row is one thread's."""
        num_rows, vocab_size = self._num_threads, 65_536
        logits = np.resize(self._numbers, (num_rows, vocab_size))
        counts = np.array([0, num_rows], np.int32)
        floats = np.zeros((num_rows, NUM_FLOATS), np.float32)
        floats[:, :4] = 1.0, 1.0, 0.0, 1.0  # temperature, top_p, min_p, repetition penalty
        nothing = np.array([-1], np.int32)
        ints = np.zeros((num_rows, NUM_INTS), np.uint32)
        inputs = SampleInputs(floats, ints, nothing, nothing, nothing, nothing, np.zeros(1, np.float32), ALL_ALLOWED)

        def pick(kept: list[jax.Array], logits: jax.Array, counts: jax.Array) -> list[jax.Array]:
            return [greedy(logits, counts, platform="native")]

        def draw(kept: list[jax.Array], logits: jax.Array, counts: jax.Array, *inputs: jax.Array) -> list[jax.Array]:
            return list(sample(logits, SampleInputs(*inputs), counts, num_top=0, platform="native"))

        picked = self._bind(pick, [], logits, counts)
        drawn = self._bind(draw, [], logits, counts, *inputs)
        self._units["greedy", 0] = self._units["sample", 0] = vocab_size
        yield ("greedy", 0), lambda: picked(logits, counts)
        yield ("sample", 0), lambda: drawn(logits, counts, *inputs)


@dataclass(frozen=True, slots=True)
class _Product:
    """Products with the matrices of a stack, for any of some like stacks."""

    bound: Callable[..., Any]
    x: np.ndarray
    counts: np.ndarray
    stacks: list[np.ndarray]
    num_calls: int

    def run(self, num_rows: int, stack: int) -> None:
        """All products of one stack."""
        self.counts[:] = num_rows
        self.bound(self.x, self.counts, self.stacks[stack])


def fill(cache: jax.Array) -> None:
    """Gives every page of a new cache memory of its own, as if it had been written."""
    address = cache.block_until_ready().unsafe_buffer_pointer()
    np.ctypeslib.as_array((ctypes.c_uint8 * cache.nbytes).from_address(address))[:] = _FILL


def _last_tokens(num_seqs: int, context_len: int) -> Rows:
    """The last token of each of some sequences with blocks of their own."""
    seqs = np.arange(num_seqs, dtype=np.int32)
    last = np.full_like(seqs, context_len - 1)
    fields = np.stack([seqs, last, last, 0 * seqs, last + 1, seqs])
    num_pages = -(-context_len // _BLOCK_LEN)
    tables = np.arange(num_seqs * num_pages, dtype=np.int32).reshape(num_seqs, num_pages)
    return Rows(fields, tables, np.array([num_seqs, 0], np.int32))  # type: ignore[arg-type]


def _calls_of(dim: int) -> int:
    """Matrices in a program: as many as make the call of the program itself small."""
    return max(4, 16 * 512 // dim)


def _where(where: str, num_rows: int) -> str:
    return where if num_rows < _WARM_ROWS else "cold"


def _curve(points: Sequence[int], values: Sequence[float]) -> Curve:
    return Curve(tuple(map(float, points)), tuple(max(value, 1e-15) for value in values))
