"""Checkpoint -> Parameters. Native: packed once into the cache file, then mapped. XLA: dequantised into memory."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.pack_cache import PackCache, PackFile, PackWriter
from strop.formats.values import TensorInfo, TensorValue, dense
from strop.models.packing import common_format, convert, pack, packed_bytes, packed_format
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.reader import ParameterReader
from strop.models.spec import LayerSpec, ModelSpec, Rope
from strop.ops.dispatch import Platform
from strop.ops.weights import TILE_COLUMNS, AnyWeight, Weight, join_parts

log = logging.getLogger(__name__)

LAYOUT_VERSION = 3
"""Raise when native/kernels/linear.h changes a tile, so that old cache files are ignored."""

_ROLES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",), "router": ("router",)}
_BIASES = {
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "o_bias": ("o_bias",),
    "gate_up_bias": ("gate_bias", "up_bias"),
    "down_bias": ("down_bias",),
    "router_bias": ("router_bias",),
}
_EXPERT_BIASES = {f"experts_{role}": _BIASES[role] for role in ("gate_up_bias", "down_bias")}
_NORMS = ("attention_norm", "q_norm", "k_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
_VECTORS = (*(name for norm in _NORMS for name in (norm, f"{norm}_bias")), "sinks")


def load(
    reader: ParameterReader, spec: ModelSpec, platform: Platform, *, num_positions: int, source_hash: Callable[[], str]
) -> Parameters:
    """Parameters on the default device.

    Args:
        num_positions: rotary tables reach this far.
        source_hash: names the content, for the pack cache; called only when packing.
    """
    if platform == "native":
        weights, vectors, layers = _load_packed(reader, spec, source_hash())
    else:
        weights, vectors, layers = _load_dense(reader, spec)
    ropes = _distinct_ropes(spec)
    tables = tuple(tuple(map(jnp.asarray, rope_tables(rope, num_positions))) for rope in ropes)
    return Parameters(weights, vectors, tables, layers)  # type: ignore[arg-type]


def rope_tables(rope: Rope, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every angle: two float32 [num_positions, rotary_dim / 2], computed in float64."""
    inv_freq = rope.theta ** -(np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
    is_long = rope.long_inv_freq_scale is not None and num_positions > rope.original_context_len
    scale = rope.long_inv_freq_scale if is_long else rope.inv_freq_scale
    if scale is not None:
        inv_freq = inv_freq * np.asarray(scale, np.float64)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq[None, :]
    return tuple((rope.amplitude * part(angles)).astype(np.float32) for part in (np.cos, np.sin))  # type: ignore[return-value]


def _distinct_ropes(spec: ModelSpec) -> list[Rope]:
    return list(dict.fromkeys(layer.attention.rope for layer in spec.layers if layer.attention.rope is not None))


class _Matrix(NamedTuple):
    """One matrix of a layer: a role of _ROLES, of an expert or of the layer itself."""

    layer: int
    role: str
    expert: int | None = None

    def paths(self, reader: ParameterReader) -> list[str]:
        """The parameters whose rows it joins."""
        prefix = f"layers.{self.layer}." + ("" if self.expert is None else f"experts.{self.expert}.")
        return [path for part in _ROLES[self.role] if (path := prefix + part) in reader.inventory]


def _matrices(spec: ModelSpec) -> list[_Matrix]:
    """All of them, layer by layer; a layer's experts follow one another."""
    found = []
    for i, layer in enumerate(spec.layers):
        found += [_Matrix(i, "qkv"), _Matrix(i, "o")]
        if layer.experts is not None:
            found.append(_Matrix(i, "router"))
            for role in ("gate_up", "down"):
                found += [_Matrix(i, role, e) for e in range(layer.experts.num_experts)]
        else:
            found += [_Matrix(i, "gate_up"), _Matrix(i, "down")]
    return found


def _assign(
    spec: ModelSpec, stack_of: Callable[[_Matrix], str]
) -> tuple[dict[str, list[_Matrix]], tuple[LayerPlaces, ...]]:
    """The matrices of each stack, in order, and every layer's places in them."""
    stacks: dict[str, list[_Matrix]] = {}
    places: list[dict[str, Place]] = [{} for _ in spec.layers]
    for matrix in _matrices(spec):
        name = stack_of(matrix)
        stacks.setdefault(name, []).append(matrix)
        # Of experts, the first.
        place = places[matrix.layer].setdefault(matrix.role, Place(name, len(stacks[name]) - 1))
        if place.stack != name:
            raise UnsupportedError(
                f"layer {matrix.layer} has expert 0 stored as {place.stack} and expert {matrix.expert} as {name};"
                " accepted are experts of one type: convert the checkpoint to one"
            )
    ropes = _distinct_ropes(spec)
    return stacks, tuple(
        LayerPlaces(
            found["qkv"],
            found["o"],
            found["gate_up"],
            found["down"],
            found.get("router"),
            None if layer.attention.rope is None else ropes.index(layer.attention.rope),
        )
        for layer, found in zip(spec.layers, places, strict=True)
    )


def _read_vectors(reader: ParameterReader, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Norms and biases, float32 [L, len], of experts [L, E, len]; a layer without one that others have gets zeros."""

    def joined(prefix: str, names: tuple[str, ...]) -> np.ndarray | None:
        paths = [path for path in (prefix + name for name in names) if path in reader.inventory]
        return np.concatenate([dense(reader.read(path)) for path in paths]) if paths else None

    def of_layer(i: int, names: tuple[str, ...]) -> np.ndarray | None:
        vector = joined(f"layers.{i}.", names)
        return None if vector is None else vector + np.float32(_weight_offset(spec.layers[i], names[0]))

    def of_experts(i: int, names: tuple[str, ...]) -> np.ndarray | None:
        experts = spec.layers[i].experts
        found = [joined(f"layers.{i}.experts.{e}.", names) for e in range(experts.num_experts if experts else 0)]
        return None if not found or found[0] is None else np.stack([vector for vector in found if vector is not None])

    def stack(of: Callable[[int, tuple[str, ...]], np.ndarray | None], names: tuple[str, ...]) -> np.ndarray | None:
        found = [of(i, names) for i in range(spec.num_layers)]
        first = next((vector for vector in found if vector is not None), None)
        return None if first is None else np.stack([np.zeros_like(first) if one is None else one for one in found])

    vectors = {name: stack(of_layer, (name,)) for name in _VECTORS}
    heads = spec.layers[0].attention
    for role, num_heads in (("q_norm", heads.num_heads), ("k_norm", heads.num_kv_heads)):
        of_heads = stack(of_layer, tuple(f"heads.{head}.{role}" for head in range(num_heads)))
        if of_heads is not None:
            vectors[role] = of_heads.reshape(spec.num_layers, num_heads, -1)
    vectors |= {name: stack(of_layer, parts) for name, parts in _BIASES.items()}
    vectors |= {name: stack(of_experts, parts) for name, parts in _EXPERT_BIASES.items()}
    for name, norm in (("embedding_norm", spec.embedding_norm), ("final_norm", spec.final_norm)):
        if norm is not None:
            vectors[name] = dense(reader.read(name))[None] + np.float32(norm.weight_offset)
            vectors[f"{name}_bias"] = dense(reader.read(f"{name}_bias"))[None] if norm.bias else None
    vectors["head_bias"] = dense(reader.read("head_bias"))[None] if spec.head_bias else None
    vectors["token_type"] = dense(reader.read("token_types"))[:1] if spec.num_token_types else None
    return {name: value for name, value in vectors.items() if value is not None}


def _weight_offset(layer: LayerSpec, role: str) -> float:
    if role in ("q_norm", "k_norm"):
        return 0.0 if layer.attention.qk_norm is None else layer.attention.qk_norm.norm.weight_offset
    norm = getattr(layer, role, None)
    return 0.0 if norm is None else float(norm.weight_offset)


def _tables(spec: ModelSpec) -> list[str]:
    """Parameters outside the layers that are matrices."""
    names = ["embed"] + ["positions"] * bool(spec.num_positions)
    return names + ["head"] * (spec.causal and not spec.tied_embeddings)


def _load_dense(
    reader: ParameterReader, spec: ModelSpec
) -> tuple[dict[str, AnyWeight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    # float32 is exact; an accelerator multiplies in bf16 and has the memory of one.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def join(matrix: _Matrix) -> np.ndarray:
        return np.concatenate([dense(reader.read(path)) for path in matrix.paths(reader)])

    def stack_of(matrix: _Matrix) -> str:
        infos = [reader.inventory[path] for path in matrix.paths(reader)]
        return f"{matrix.role}.{sum(info.shape[0] for info in infos)}x{infos[0].shape[1]}"

    stacks, places = _assign(spec, stack_of)
    weights: dict[str, AnyWeight] = {}
    for name, members in stacks.items():
        matrices = np.stack([join(matrix) for matrix in members])
        weights[name] = Weight(jnp.asarray(matrices, dtype), "dense", matrices.shape[1:])
    for name in _tables(spec):
        matrix = dense(reader.read(name))
        weights[name] = Weight(jnp.asarray(matrix, dtype)[None], "dense", matrix.shape)
    return weights, {name: jnp.asarray(value) for name, value in _read_vectors(reader, spec).items()}, places


def _load_packed(
    reader: ParameterReader, spec: ModelSpec, source_hash: str
) -> tuple[dict[str, AnyWeight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    packed = PackCache().open_or_build(
        f"{source_hash}-tiles{LAYOUT_VERSION}", lambda writer: _write_pack(reader, spec, writer)
    )
    manifest = json.loads(bytes(packed["manifest"]))
    _report_rounding(manifest["rounding"])
    weights = {
        name: join_parts(
            [
                Weight(_on_device(packed, f"{name}.{i}"), format_name, tuple(shape))
                for i, (format_name, shape) in enumerate(parts)
            ]
        )
        for name, parts in manifest["weights"].items()
    }
    vectors = {name: _on_device(packed, name) for name in manifest["vectors"]}
    names = iter(manifest["stacks"])
    _, places = _assign(spec, lambda matrix: next(names))
    return weights, vectors, places


def _on_device(packed: PackFile, name: str) -> jax.Array:
    # device_put keeps a 64-byte aligned host array in place: the pages stay the file's.
    return jax.device_put(packed[name])


class _Run(NamedTuple):
    """Rows of a matrix that are packed in one format."""

    format_name: str
    paths: tuple[str, ...]
    shape: tuple[int, int]
    interleaved: bool
    """Gate and up."""


def _runs(
    reader: ParameterReader, paths: list[str], outline: Callable[[str], TensorValue], interleaved: bool = False
) -> tuple[_Run, ...]:
    """How the rows of `paths` are packed as one matrix: in their own formats, unless tiles alternate.

    A Q4_K_M file has values in Q6_K beside queries and keys in Q4_K in half of its layers. Only f32 holds both exactly;
    even 9 bits for all three, rounded, would be 12 MB more than the 17 of two formats in a layer of Llama 8B: half a
    millisecond a token at the speed of memory, a hundred times what a second call costs.
    """
    names = [packed_format(outline(path)) for path in paths]
    if interleaved:
        names = [common_format(names)] * len(names)
    runs = []
    for name, group in groupby(zip(names, paths, strict=True), lambda pair: pair[0]):
        own = tuple(path for _, path in group)
        num_rows = sum(reader.inventory[path].shape[0] for path in own)
        runs.append(_Run(name, own, (num_rows, reader.inventory[own[0]].shape[1]), interleaved))
    return tuple(runs)


def _stack_runs(
    reader: ParameterReader, spec: ModelSpec, outline: Callable[[str], TensorValue]
) -> Iterator[tuple[_Matrix | str, tuple[_Run, ...]]]:
    """Every matrix, be it of a layer or a table, with how it is packed. `outline` is the reader's, or `_sampled`."""
    for matrix in _matrices(spec):
        paths = matrix.paths(reader)
        yield matrix, _runs(reader, paths, outline, interleaved=matrix.role == "gate_up" and len(paths) == 2)
    for name in _tables(spec):
        yield name, _runs(reader, [name], outline)


def _stack_name(matrix: _Matrix, runs: tuple[_Run, ...]) -> str:
    return f"{matrix.role}." + "+".join(f"{run.format_name}.{run.shape[0]}x{run.shape[1]}" for run in runs)


def _sampled(reader: ParameterReader) -> Callable[[str], TensorValue]:
    """Outlines by the smallest tensor of each format, since weights of a Hugging Face quantiser are read for theirs."""
    samples: dict[tuple[str, float], TensorValue] = {}
    tensors = reader.checkpoint.tensors

    def kind(info: TensorInfo) -> tuple[str, float]:
        return info.format, info.num_bytes / max(1, math.prod(info.shape))

    def outline(path: str) -> TensorValue:
        found = kind(tensors[reader.tensor_name(path)])
        if found not in samples:
            alike = [info for info in tensors.values() if kind(info) == found and len(info.shape) > 1]
            samples[found] = reader.checkpoint.outline(min(alike, key=lambda info: info.num_bytes).name)
        return samples[found]

    return outline


def packed_weight_bytes(reader: ParameterReader, spec: ModelSpec) -> int:
    """Bytes of all matrices once packed."""
    runs = [run for _, matrix_runs in _stack_runs(reader, spec, _sampled(reader)) for run in matrix_runs]
    return sum(packed_bytes(run.format_name, *run.shape) for run in runs)


def _pack_run(reader: ParameterReader, run: _Run, out: np.ndarray) -> dict[str, tuple[float, float]]:
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
    runs = dict(_stack_runs(reader, spec, reader.outline))

    def stack_of(matrix: _Matrix) -> str:
        name = _stack_name(matrix, runs[matrix])
        manifest["stacks"].append(name)
        return name

    stacks: dict[str, Sequence[_Matrix | str]] = {
        **_assign(spec, stack_of)[0],
        **{name: [name] for name in _tables(spec)},
    }
    for name, members in stacks.items():
        manifest["weights"][name] = [(run.format_name, run.shape) for run in runs[members[0]]]
        for i, (format_name, shape) in enumerate(manifest["weights"][name]):
            out = writer.reserve(f"{name}.{i}", (len(members), packed_bytes(format_name, *shape)), np.dtype(np.uint8))
            for at, member in enumerate(members):
                manifest["rounding"] |= _pack_run(reader, runs[member][i], out[at])
    for name, value in _read_vectors(reader, spec).items():
        if name.endswith("gate_up_bias") and spec.layers[0].mlp.gated:  # in the order of the alternating tiles
            *stacked, length = value.shape
            value = value.reshape(*stacked, 2, -1, TILE_COLUMNS).swapaxes(-3, -2).reshape(*stacked, length)
        if name.endswith("_bias") and name.removesuffix("_bias") not in _VECTORS:
            value = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, -value.shape[-1] % TILE_COLUMNS)])
        writer.add(name, np.ascontiguousarray(value, np.float32))
        manifest["vectors"].append(name)
    manifest["source"] = str(reader.checkpoint.path.absolute())  # only to tell people what the pack is of
    writer.add("manifest", np.frombuffer(json.dumps(manifest).encode(), np.uint8))


def pack_directory() -> Path:
    """Where packed weights are kept."""
    return PackCache().directory


def load_abstract(reader: ParameterReader, spec: ModelSpec, platform: Platform, *, num_positions: int) -> Parameters:
    """What `load` returns, with shapes in place of the matrices: for counting costs.

    Reads the vectors, and the smallest tensor of each format. `xla` is counted in float32.
    """

    def weight(count: int, run: _Run) -> Weight:
        if platform == "xla":
            return Weight(jax.ShapeDtypeStruct((count, *run.shape), jnp.float32), "dense", run.shape)  # type: ignore[arg-type]
        data = jax.ShapeDtypeStruct((count, packed_bytes(run.format_name, *run.shape)), jnp.uint8)
        return Weight(data, run.format_name, run.shape)  # type: ignore[arg-type]

    def whole(runs: tuple[_Run, ...]) -> tuple[_Run, ...]:
        shape = sum(run.shape[0] for run in runs), runs[0].shape[1]
        return runs if platform == "native" else (_Run("dense", (), shape, False),)

    runs = {member: whole(found) for member, found in _stack_runs(reader, spec, _sampled(reader))}
    stacks, places = _assign(spec, lambda matrix: _stack_name(matrix, runs[matrix]))
    members: dict[str, Sequence[_Matrix | str]] = {**stacks, **{name: [name] for name in _tables(spec)}}
    weights = {name: join_parts([weight(len(some), run) for run in runs[some[0]]]) for name, some in members.items()}
    tables = [
        jax.ShapeDtypeStruct((num_positions, rope.rotary_dim // 2), jnp.float32) for rope in _distinct_ropes(spec)
    ]
    vectors = {name: jnp.asarray(value) for name, value in _read_vectors(reader, spec).items()}
    ropes: Any = tuple((table, table) for table in tables)
    return Parameters(weights, vectors, ropes, places)
