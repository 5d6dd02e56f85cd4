"""Checkpoint -> Parameters. Native: packed once into the cache file, then mapped. XLA: dequantised into memory."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from strop.core.errors import UnsupportedError
from strop.formats.pack_cache import PackCache, PackFile, PackWriter
from strop.formats.values import TensorInfo, TensorValue, dense
from strop.models.packing import pack, packed_bytes, packed_format, unify
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.reader import ParameterReader
from strop.models.spec import LayerSpec, ModelSpec, Rope
from strop.ops.dispatch import Platform
from strop.ops.weights import TILE_COLUMNS, Weight

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

    @property
    def paths(self) -> list[str]:
        """The parameters whose rows it joins, of those there may be."""
        prefix = f"layers.{self.layer}." + ("" if self.expert is None else f"experts.{self.expert}.")
        return [prefix + part for part in _ROLES[self.role]]


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


def _read_matrix(reader: ParameterReader, matrix: _Matrix) -> list[TensorValue]:
    return unify([reader.read(path) for path in matrix.paths if path in reader.inventory])


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
) -> tuple[dict[str, Weight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    # float32 is exact; an accelerator multiplies in bf16 and has the memory of one.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def join(matrix: _Matrix) -> np.ndarray:
        return np.concatenate([dense(part) for part in _read_matrix(reader, matrix)])

    def stack_of(matrix: _Matrix) -> str:
        infos = [reader.inventory[path] for path in matrix.paths if path in reader.inventory]
        return f"{matrix.role}.{sum(info.shape[0] for info in infos)}x{infos[0].shape[1]}"

    stacks, places = _assign(spec, stack_of)
    weights = {}
    for name, members in stacks.items():
        matrices = np.stack([join(matrix) for matrix in members])
        weights[name] = Weight(jnp.asarray(matrices, dtype), "dense", matrices.shape[1:])
    for name in _tables(spec):
        matrix = dense(reader.read(name))
        weights[name] = Weight(jnp.asarray(matrix, dtype)[None], "dense", matrix.shape)
    return weights, {name: jnp.asarray(value) for name, value in _read_vectors(reader, spec).items()}, places


def _load_packed(
    reader: ParameterReader, spec: ModelSpec, source_hash: str
) -> tuple[dict[str, Weight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    packed = PackCache().open_or_build(
        f"{source_hash}-tiles{LAYOUT_VERSION}", lambda writer: _write_pack(reader, spec, writer)
    )
    manifest = json.loads(bytes(packed["manifest"]))
    weights = {
        name: Weight(_on_device(packed, name), entry["format"], tuple(entry["shape"]))
        for name, entry in manifest["weights"].items()
    }
    vectors = {name: _on_device(packed, name) for name in manifest["vectors"]}
    names = iter(manifest["stacks"])
    _, places = _assign(spec, lambda matrix: next(names))
    return weights, vectors, places


def _on_device(packed: PackFile, name: str) -> jax.Array:
    # device_put keeps a 64-byte aligned host array in place: the pages stay the file's.
    return jax.device_put(packed[name])


def _write_pack(reader: ParameterReader, spec: ModelSpec, writer: PackWriter) -> None:
    log.info("packing the weights for this machine's kernels: once per model")
    manifest: dict[str, Any] = {"weights": {}, "vectors": [], "stacks": []}
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}

    def stack_of(matrix: _Matrix) -> str:
        parts = _read_matrix(reader, matrix)
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        name = f"{matrix.role}.{packed_format(parts[0])}.{shape[0]}x{shape[1]}"
        shapes[name] = (packed_format(parts[0]), shape)
        manifest["stacks"].append(name)
        return name

    stacks, _ = _assign(spec, stack_of)
    for name, members in stacks.items():
        format_name, shape = shapes[name]
        out = writer.reserve(name, (len(members), packed_bytes(format_name, *shape)), np.dtype(np.uint8))
        for at, matrix in enumerate(members):
            parts = _read_matrix(reader, matrix)
            pack(parts, out[at], interleave=matrix.role == "gate_up" and len(parts) == 2)
        manifest["weights"][name] = {"format": format_name, "shape": shape}
    for name in _tables(spec):
        value = reader.read(name)
        format_name = packed_format(value)
        pack([value], writer.reserve(name, (1, packed_bytes(format_name, *value.shape)), np.dtype(np.uint8))[0])
        manifest["weights"][name] = {"format": format_name, "shape": value.shape}
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
    samples: dict[tuple[str, float], TensorValue] = {}

    def kind(info: TensorInfo) -> tuple[str, float]:
        return info.format, info.num_bytes / max(1, math.prod(info.shape))

    def sample(path: str) -> TensorValue:
        found = kind(reader.checkpoint.tensors[reader.tensor_name(path)])
        if found not in samples:
            alike = [info for info in reader.checkpoint.tensors.values() if kind(info) == found]
            samples[found] = reader.checkpoint.read(min(alike, key=lambda info: info.num_bytes).name)
        return samples[found]

    def format_and_shape(paths: list[str]) -> tuple[str, tuple[int, int]]:
        rows = sum(reader.inventory[path].shape[0] for path in paths)
        shape = (rows, reader.inventory[paths[0]].shape[1])
        return "dense" if platform == "xla" else packed_format(unify([sample(path) for path in paths])[0]), shape

    def weight(count: int, format_name: str, shape: tuple[int, int]) -> Weight:
        if format_name == "dense":
            data = jax.ShapeDtypeStruct((count, *shape), jnp.float32)
        else:
            data = jax.ShapeDtypeStruct((count, packed_bytes(format_name, *shape)), jnp.uint8)
        return Weight(data, format_name, shape)  # type: ignore[arg-type]

    shapes: dict[str, tuple[str, tuple[int, int]]] = {}

    def stack_of(matrix: _Matrix) -> str:
        found = format_and_shape([path for path in matrix.paths if path in reader.inventory])
        name = f"{matrix.role}.{found[0]}.{found[1][0]}x{found[1][1]}"
        shapes[name] = found
        return name

    stacks, places = _assign(spec, stack_of)
    weights = {name: weight(len(members), *shapes[name]) for name, members in stacks.items()}
    for name in _tables(spec):
        weights[name] = weight(1, *format_and_shape([name]))
    tables = [
        jax.ShapeDtypeStruct((num_positions, rope.rotary_dim // 2), jnp.float32) for rope in _distinct_ropes(spec)
    ]
    vectors = {name: jnp.asarray(value) for name, value in _read_vectors(reader, spec).items()}
    ropes: Any = tuple((table, table) for table in tables)
    return Parameters(weights, vectors, ropes, places)
