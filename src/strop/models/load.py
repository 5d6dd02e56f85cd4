"""Checkpoint -> Parameters. Native: packed once into the cache file, then mapped. XLA: dequantised into memory."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from strop.formats.pack_cache import PackCache, PackFile, PackWriter
from strop.formats.values import TensorInfo, TensorValue, dense
from strop.models.packing import pack, packed_bytes, packed_format, unify
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.reader import ParameterReader
from strop.models.spec import ModelSpec, Rope
from strop.ops.dispatch import Platform
from strop.ops.weights import TILE_COLUMNS, Weight

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Raise when native/kernels/linear.h changes a tile, so that old cache files are ignored."""

_ROLES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
_BIASES = {
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "o_bias": ("o_bias",),
    "gate_up_bias": ("gate_bias", "up_bias"),
    "down_bias": ("down_bias",),
}


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
    if rope.inv_freq_scale is not None:
        inv_freq = inv_freq * np.asarray(rope.inv_freq_scale, np.float64)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inv_freq[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _distinct_ropes(spec: ModelSpec) -> list[Rope]:
    return list(dict.fromkeys(layer.attention.rope for layer in spec.layers if layer.attention.rope is not None))


def _read_role(reader: ParameterReader, layer: int, role: str) -> list[TensorValue]:
    return unify([reader.read(f"layers.{layer}.{part}") for part in _ROLES[role]])


def _assign(
    spec: ModelSpec, stack_of: Callable[[int, str], str]
) -> tuple[dict[str, list[int]], tuple[LayerPlaces, ...]]:
    """Layers of each stack, in order, and every layer's places in them."""
    stacks: dict[str, list[int]] = {}
    ropes = _distinct_ropes(spec)
    places = []
    for i, layer in enumerate(spec.layers):
        found = {}
        for role in _ROLES:
            name = stack_of(i, role)
            stacks.setdefault(name, []).append(i)
            found[role] = Place(name, len(stacks[name]) - 1)
        rope = layer.attention.rope
        places.append(LayerPlaces(**found, rope=None if rope is None else ropes.index(rope)))
    return stacks, tuple(places)


def _read_vectors(reader: ParameterReader, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Norms and biases, float32 [L, len]; a layer without a bias that others have gets zeros."""

    def stack(names: tuple[str, ...]) -> np.ndarray:
        found = {
            layer: np.concatenate([dense(reader.read(f"layers.{layer}.{name}")) for name in names])
            for layer in range(spec.num_layers)
            if f"layers.{layer}.{names[0]}" in reader.inventory
        }
        length = len(next(iter(found.values())))
        return np.stack([found.get(layer, np.zeros(length, np.float32)) for layer in range(spec.num_layers)])

    vectors = {"attention_norm": stack(("attention_norm",)), "mlp_norm": stack(("mlp_norm",))}
    vectors["final_norm"] = dense(reader.read("final_norm"))[None]
    for name, parts in _BIASES.items():
        if any(f"layers.{layer}.{parts[0]}" in reader.inventory for layer in range(spec.num_layers)):
            vectors[name] = stack(parts)
    return vectors


def _load_dense(
    reader: ParameterReader, spec: ModelSpec
) -> tuple[dict[str, Weight], dict[str, jax.Array], tuple[LayerPlaces, ...]]:
    # float32 is exact; an accelerator multiplies in bf16 and has the memory of one.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def join(layer: int, role: str) -> np.ndarray:
        return np.concatenate([dense(part) for part in _read_role(reader, layer, role)])

    def shape(layer: int, role: str) -> str:
        heads, mlp = spec.layers[layer].attention, spec.layers[layer].mlp
        return f"{role}.{heads.num_heads}.{heads.num_kv_heads}.{heads.head_dim}.{mlp.ffn_dim}"

    stacks, places = _assign(spec, shape)
    weights = {}
    for name, layers in stacks.items():
        matrices = np.stack([join(layer, name.split(".")[0]) for layer in layers])
        weights[name] = Weight(jnp.asarray(matrices, dtype), "dense", matrices.shape[1:])
    for name in ("embed",) if spec.tied_embeddings else ("embed", "head"):
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
    _, places = _assign(spec, lambda layer, role: manifest["stacks"][role][layer])
    return weights, vectors, places


def _on_device(packed: PackFile, name: str) -> jax.Array:
    # device_put keeps a 64-byte aligned host array in place: the pages stay the file's.
    return jax.device_put(packed[name])


def _write_pack(reader: ParameterReader, spec: ModelSpec, writer: PackWriter) -> None:
    log.info("packing the weights for this machine's kernels: once per model")
    manifest: dict[str, Any] = {"weights": {}, "vectors": [], "stacks": {role: [] for role in _ROLES}}
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}

    def stack_of(layer: int, role: str) -> str:
        parts = _read_role(reader, layer, role)
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        name = f"{role}.{packed_format(parts[0])}.{shape[0]}x{shape[1]}"
        shapes[name] = (packed_format(parts[0]), shape)
        manifest["stacks"][role].append(name)
        return name

    stacks, _ = _assign(spec, stack_of)
    for name, layers in stacks.items():
        format_name, shape = shapes[name]
        out = writer.reserve(name, (len(layers), packed_bytes(format_name, *shape)), np.dtype(np.uint8))
        for at, layer in enumerate(layers):
            role = name.split(".")[0]
            pack(_read_role(reader, layer, role), out[at], interleave=role == "gate_up")
        manifest["weights"][name] = {"format": format_name, "shape": shape}
    for name in ("embed",) if spec.tied_embeddings else ("embed", "head"):
        value = reader.read(name)
        format_name = packed_format(value)
        pack([value], writer.reserve(name, (1, packed_bytes(format_name, *value.shape)), np.dtype(np.uint8))[0])
        manifest["weights"][name] = {"format": format_name, "shape": value.shape}
    for name, value in _read_vectors(reader, spec).items():
        if name == "gate_up_bias":  # in the order of the alternating tiles
            value = value.reshape(len(value), 2, -1, TILE_COLUMNS).swapaxes(1, 2).reshape(len(value), -1)
        if name.endswith("_bias"):
            value = np.pad(value, ((0, 0), (0, -value.shape[1] % TILE_COLUMNS)))
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

    def stack_of(layer: int, role: str) -> str:
        found = format_and_shape([f"layers.{layer}.{part}" for part in _ROLES[role]])
        name = f"{role}.{found[0]}.{found[1][0]}x{found[1][1]}"
        shapes[name] = found
        return name

    stacks, places = _assign(spec, stack_of)
    weights = {name: weight(len(layers), *shapes[name]) for name, layers in stacks.items()}
    for name in ("embed",) if spec.tied_embeddings else ("embed", "head"):
        weights[name] = weight(1, *format_and_shape([name]))
    tables = [
        jax.ShapeDtypeStruct((num_positions, rope.rotary_dim // 2), jnp.float32) for rope in _distinct_ropes(spec)
    ]
    vectors = {name: jnp.asarray(value) for name, value in _read_vectors(reader, spec).items()}
    ropes: Any = tuple((table, table) for table in tables)
    return Parameters(weights, vectors, ropes, places)
