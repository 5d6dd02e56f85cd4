"""Checkpoint -> Parameters. Native: packed once into the cache file, then mapped. XLA: dequantised into memory."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from strop.formats.pack_cache import PackCache, PackFile, PackWriter
from strop.formats.values import TensorInfo, dense
from strop.models.abstract import abstract_parameters
from strop.models.packing import convert, pack, packed_bytes, packed_format
from strop.models.parameters import LayerPlaces, Parameters
from strop.models.reader import ParameterReader
from strop.models.spec import ModelSpec, Rope
from strop.models.stacks import (
    VECTORS,
    Matrix,
    Run,
    assign,
    distinct_ropes,
    stack_name,
    stack_runs,
    stack_vectors,
    tables,
)
from strop.ops.dispatch import Platform
from strop.ops.weights import TILE_COLUMNS, AnyWeight, Weight, join_parts

if TYPE_CHECKING:
    from strop.models.sharding import Sharder

log = logging.getLogger(__name__)

Place = Callable[[str, str, int, AnyWeight], Mapping[str, AnyWeight]]
"""(name, role, a layer that uses it, stack) -> the stacks that it becomes where it is to be. See Sharder.place."""

LAYOUT_VERSION = 3
"""Raise when native/kernels/linear.h changes a tile, so that old cache files are ignored."""


def load(
    reader: ParameterReader,
    spec: ModelSpec,
    platform: Platform,
    *,
    num_positions: int,
    source_hash: Callable[[], str],
    sharder: "Sharder | None" = None,
) -> Parameters:
    """Parameters on the default device, or on a mesh.

    Args:
        num_positions: rotary tables reach this far.
        source_hash: names the content, for the pack cache; called only when packing.
        sharder: puts them on the mesh.
    """
    place = _as_is if sharder is None else sharder.place
    if platform == "native":
        weights, vectors, layers = _load_packed(reader, spec, source_hash(), place)
    else:
        weights, vectors, layers = _load_dense(reader, spec, place)
    ropes = tuple(tuple(map(jnp.asarray, rope_tables(rope, num_positions))) for rope in distinct_ropes(spec))
    params = Parameters(weights, vectors, ropes, layers)  # type: ignore[arg-type]
    return params if sharder is None else sharder.finish(params)


def _as_is(name: str, role: str, layer: int, weight: AnyWeight) -> dict[str, AnyWeight]:
    return {name: weight}


def rope_tables(rope: Rope, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every angle: two float32 [num_positions, rotary_dim / 2], computed in float64."""
    inv_freq = rope.theta ** -(np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
    is_long = rope.long_inv_freq_scale is not None and num_positions > rope.original_context_len
    scale = rope.long_inv_freq_scale if is_long else rope.inv_freq_scale
    if scale is not None:
        inv_freq = inv_freq * np.asarray(scale, np.float64)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq[None, :]
    return tuple((rope.amplitude * part(angles)).astype(np.float32) for part in (np.cos, np.sin))  # type: ignore[return-value]


def _load_dense(
    reader: ParameterReader, spec: ModelSpec, place: Place
) -> tuple[dict[str, AnyWeight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    # float32 is exact; an accelerator multiplies in bf16 and has the memory of one.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def join(matrix: Matrix) -> np.ndarray:
        return np.concatenate([dense(reader.read(path)) for path in matrix.paths(reader.inventory)])

    def stack_of(matrix: Matrix) -> str:
        infos = [reader.inventory[path] for path in matrix.paths(reader.inventory)]
        return f"{matrix.role}.{sum(info.shape[0] for info in infos)}x{infos[0].shape[1]}"

    stacks, places = assign(spec, stack_of)
    weights: dict[str, AnyWeight] = {}
    for name, members in stacks.items():
        matrices = np.stack([join(matrix) for matrix in members])
        weight = Weight(jnp.asarray(matrices, dtype), "dense", matrices.shape[1:])
        weights |= place(name, members[0].role, members[0].layer, weight)
    for name in tables(spec):
        matrix = dense(reader.read(name))
        weights |= place(name, name, 0, Weight(jnp.asarray(matrix, dtype)[None], "dense", matrix.shape))
    return (
        weights,
        {
            name: jnp.asarray(value)
            for name, value in stack_vectors(spec, reader.inventory, lambda path: dense(reader.read(path))).items()
        },
        places,
    )


def _load_packed(
    reader: ParameterReader, spec: ModelSpec, source_hash: str, place: Place
) -> tuple[dict[str, AnyWeight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    packed = PackCache().open_or_build(
        f"{source_hash}-tiles{LAYOUT_VERSION}", lambda writer: _write_pack(reader, spec, writer)
    )
    manifest = json.loads(bytes(packed["manifest"]))
    _report_rounding(manifest["rounding"])
    names = iter(manifest["stacks"])
    stacks, places = assign(spec, lambda matrix: next(names))
    users = {name: (members[0].role, members[0].layer) for name, members in stacks.items()}
    weights: dict[str, AnyWeight] = {}
    for name, parts in manifest["weights"].items():
        weight = join_parts(
            [
                Weight(_on_device(packed, f"{name}.{i}"), format_name, tuple(shape))
                for i, (format_name, shape) in enumerate(parts)
            ]
        )
        role, layer = users.get(name, (name, 0))
        weights |= place(name, role, layer, weight)
    vectors = {name: _on_device(packed, name) for name in manifest["vectors"]}
    return weights, vectors, places


def _on_device(packed: PackFile, name: str) -> jax.Array:
    # device_put keeps a 64-byte aligned host array in place: the pages stay the file's.
    return jax.device_put(packed[name])


def _packed_formats(reader: ParameterReader) -> Callable[[str], str]:
    """The format in which a parameter is packed, by the smallest tensor of each format, since weights of a Hugging Face
    quantiser are read for theirs."""
    found: dict[tuple[str, float], str] = {}
    tensors = reader.checkpoint.tensors

    def kind(info: TensorInfo) -> tuple[str, float]:
        return info.format, info.num_bytes / max(1, math.prod(info.shape))

    def format_of(path: str) -> str:
        own = kind(tensors[reader.tensor_name(path)])
        if own not in found:
            alike = [info for info in tensors.values() if kind(info) == own and len(info.shape) > 1]
            smallest = min(alike, key=lambda info: info.num_bytes).name
            found[own] = packed_format(reader.checkpoint.outline(smallest))
        return found[own]

    return format_of


def packed_runs(reader: ParameterReader, spec: ModelSpec) -> list[Run]:
    """What all matrices consist of, as they are packed."""
    return [run for _, found in stack_runs(spec, reader.inventory, _packed_formats(reader)) for run in found]


def _pack_run(reader: ParameterReader, run: Run, out: np.ndarray) -> dict[str, tuple[float, float]]:
    """Packs it into `out`; the error (rms, largest) of every parameter that had to be rounded."""
    parts, errors = [], {}
    for path in run.paths:
        part, error = convert(reader.read(path), run.format_name)
        parts.append(part)
        if error is not None and error.largest:
            errors[path] = error.rms, error.largest
    pack(parts, run.format_name, out, interleave=run.interleaved)
    return errors


def _report_rounding(errors: Mapping[str, tuple[float, float]]) -> None:
    """One line on what the pack does not hold exactly."""
    if not errors:
        return
    roles = Counter(path.rpartition(".")[2] for path in errors)
    rms = math.sqrt(sum(rms * rms for rms, _ in errors.values()) / len(errors))
    log.info(
        "rounded to 8-bit groups of 32, as their types have no kernels: %s; error relative to the largest weight of its"
        " group: rms %.2g, worst %.2g",
        ", ".join(f"{role} ({count} x)" for role, count in roles.items()),
        rms,
        max(largest for _, largest in errors.values()),
    )


def _write_pack(reader: ParameterReader, spec: ModelSpec, writer: PackWriter) -> None:
    log.info("packing the weights for this machine's kernels: once per model")
    manifest: dict[str, Any] = {"weights": {}, "vectors": [], "stacks": [], "rounding": {}}
    runs = dict(stack_runs(spec, reader.inventory, lambda path: packed_format(reader.outline(path))))

    def stack_of(matrix: Matrix) -> str:
        name = stack_name(matrix, runs[matrix])
        manifest["stacks"].append(name)
        return name

    stacks: dict[str, Sequence[Matrix | str]] = {
        **assign(spec, stack_of)[0],
        **{name: [name] for name in tables(spec)},
    }
    for name, members in stacks.items():
        manifest["weights"][name] = [(run.format_name, run.shape) for run in runs[members[0]]]
        for i, (format_name, shape) in enumerate(manifest["weights"][name]):
            out = writer.reserve(f"{name}.{i}", (len(members), packed_bytes(format_name, *shape)), np.dtype(np.uint8))
            for at, member in enumerate(members):
                manifest["rounding"] |= _pack_run(reader, runs[member][i], out[at])
    for name, value in stack_vectors(spec, reader.inventory, lambda path: dense(reader.read(path))).items():
        if name.endswith("gate_up_bias") and spec.layers[0].mlp.gated:  # in the order of the alternating tiles
            *stacked, length = value.shape
            value = value.reshape(*stacked, 2, -1, TILE_COLUMNS).swapaxes(-3, -2).reshape(*stacked, length)
        if name.endswith("_bias") and name.removesuffix("_bias") not in VECTORS:
            value = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, -value.shape[-1] % TILE_COLUMNS)])
        writer.add(name, np.ascontiguousarray(value, np.float32))
        manifest["vectors"].append(name)
    manifest["source"] = str(reader.checkpoint.path.absolute())  # only to tell people what the pack is of
    writer.add("manifest", np.frombuffer(json.dumps(manifest).encode(), np.uint8))


def pack_directory() -> Path:
    """Where packed weights are kept."""
    return PackCache().directory


def load_abstract(reader: ParameterReader, spec: ModelSpec, platform: Platform, *, num_positions: int) -> Parameters:
    """What `load` returns, with shapes in place of the arrays: for counting costs.

    Reads the smallest tensor of each format. `xla` is counted in float32.
    """
    format_of = _packed_formats(reader) if platform == "native" else lambda path: "f32"
    return abstract_parameters(spec, format_of, platform, num_positions=num_positions)
