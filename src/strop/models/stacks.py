"""How parameters lie in few arrays: the matrices of all layers, and the vectors, stacked by role, format and shape."""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np

from strop.core.errors import UnsupportedError
from strop.models.packing import common_format
from strop.models.parameters import LayerPlaces, Place
from strop.models.params import ParamInfo
from strop.models.spec import LayerSpec, ModelSpec, Rope

Inventory = Mapping[str, ParamInfo]
"""As strop.models.params.inventory makes it."""

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
VECTORS = (*(name for norm in _NORMS for name in (norm, f"{norm}_bias")), "sinks")


def distinct_ropes(spec: ModelSpec) -> list[Rope]:
    """In the order of their first layers."""
    return list(dict.fromkeys(layer.attention.rope for layer in spec.layers if layer.attention.rope is not None))


class Matrix(NamedTuple):
    """One matrix of a layer: a role of _ROLES, of an expert or of the layer itself."""

    layer: int
    role: str
    expert: int | None = None

    def paths(self, inventory: Inventory) -> list[str]:
        """The parameters whose rows it joins."""
        prefix = f"layers.{self.layer}." + ("" if self.expert is None else f"experts.{self.expert}.")
        return [path for part in _ROLES[self.role] if (path := prefix + part) in inventory]


def matrices(spec: ModelSpec) -> list[Matrix]:
    """All of them, layer by layer; a layer's experts follow one another."""
    found = []
    for i, layer in enumerate(spec.layers):
        found += [Matrix(i, "qkv"), Matrix(i, "o")]
        if layer.experts is not None:
            found.append(Matrix(i, "router"))
            for role in ("gate_up", "down"):
                found += [Matrix(i, role, e) for e in range(layer.experts.num_experts)]
        else:
            found += [Matrix(i, "gate_up"), Matrix(i, "down")]
    return found


def assign(
    spec: ModelSpec, stack_of: Callable[[Matrix], str]
) -> tuple[dict[str, list[Matrix]], tuple[LayerPlaces, ...]]:
    """The matrices of each stack, in order, and every layer's places in them."""
    stacks: dict[str, list[Matrix]] = {}
    places: list[dict[str, Place]] = [{} for _ in spec.layers]
    for matrix in matrices(spec):
        name = stack_of(matrix)
        stacks.setdefault(name, []).append(matrix)
        # Of experts, the first.
        place = places[matrix.layer].setdefault(matrix.role, Place(name, len(stacks[name]) - 1))
        if place.stack != name:
            raise UnsupportedError(
                f"layer {matrix.layer} has expert 0 stored as {place.stack} and expert {matrix.expert} as {name};"
                " accepted are experts of one type: convert the checkpoint to one"
            )
    ropes = distinct_ropes(spec)
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


def stack_vectors(spec: ModelSpec, inventory: Inventory, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Norms and biases, float32 [L, len], of experts [L, E, len]; a layer without one that others have gets zeros.

    `read` gives the parameter of a path.
    """

    def joined(prefix: str, names: tuple[str, ...]) -> np.ndarray | None:
        paths = [path for path in (prefix + name for name in names) if path in inventory]
        return np.concatenate([read(path) for path in paths]) if paths else None

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

    vectors = {name: stack(of_layer, (name,)) for name in VECTORS}
    heads = spec.layers[0].attention
    for role, num_heads in (("q_norm", heads.num_heads), ("k_norm", heads.num_kv_heads)):
        of_heads = stack(of_layer, tuple(f"heads.{head}.{role}" for head in range(num_heads)))
        if of_heads is not None:
            vectors[role] = of_heads.reshape(spec.num_layers, num_heads, -1)
    vectors |= {name: stack(of_layer, parts) for name, parts in _BIASES.items()}
    vectors |= {name: stack(of_experts, parts) for name, parts in _EXPERT_BIASES.items()}
    for name, norm in (("embedding_norm", spec.embedding_norm), ("final_norm", spec.final_norm)):
        if norm is not None:
            vectors[name] = read(name)[None] + np.float32(norm.weight_offset)
            vectors[f"{name}_bias"] = read(f"{name}_bias")[None] if norm.bias else None
    vectors["head_bias"] = read("head_bias")[None] if spec.head_bias else None
    vectors["token_type"] = read("token_types")[:1] if spec.num_token_types else None
    return {name: value for name, value in vectors.items() if value is not None}


def _weight_offset(layer: LayerSpec, role: str) -> float:
    if role in ("q_norm", "k_norm"):
        return 0.0 if layer.attention.qk_norm is None else layer.attention.qk_norm.norm.weight_offset
    norm = getattr(layer, role, None)
    return 0.0 if norm is None else float(norm.weight_offset)


def tables(spec: ModelSpec) -> list[str]:
    """Parameters outside the layers that are matrices."""
    names = ["embed"] + ["positions"] * bool(spec.num_positions)
    return names + ["head"] * (spec.causal and not spec.tied_embeddings)


class Run(NamedTuple):
    """Rows of a matrix that are packed in one format."""

    format_name: str
    paths: tuple[str, ...]
    shape: tuple[int, int]
    interleaved: bool
    """Gate and up."""


def runs(
    inventory: Inventory, paths: list[str], format_of: Callable[[str], str], interleaved: bool = False
) -> tuple[Run, ...]:
    """How the rows of `paths` are packed as one matrix: in their own formats, unless tiles alternate.

    A Q4_K_M file has values in Q6_K beside queries and keys in Q4_K in half of its layers. Only f32 holds both exactly;
    even 9 bits for all three, rounded, would be 12 MB more than the 17 of two formats in a layer of Llama 8B: half a
    millisecond a token at the speed of memory, a hundred times what a second call costs.
    """
    names = [format_of(path) for path in paths]
    if interleaved and len(set(names)) > 1:
        names = [common_format(names)] * len(names)
    found = []
    for name, group in groupby(zip(names, paths, strict=True), lambda pair: pair[0]):
        own = tuple(path for _, path in group)
        num_rows = sum(inventory[path].shape[0] for path in own)
        found.append(Run(name, own, (num_rows, inventory[own[0]].shape[1]), interleaved))
    return tuple(found)


def stack_runs(
    spec: ModelSpec, inventory: Inventory, format_of: Callable[[str], str]
) -> Iterator[tuple[Matrix | str, tuple[Run, ...]]]:
    """Every matrix, be it of a layer or a table, with how it is packed. `format_of` gives that of a parameter."""
    for matrix in matrices(spec):
        paths = matrix.paths(inventory)
        yield matrix, runs(inventory, paths, format_of, interleaved=matrix.role == "gate_up" and len(paths) == 2)
    for name in tables(spec):
        yield name, runs(inventory, [name], format_of)


def stack_name(matrix: Matrix, runs: tuple[Run, ...]) -> str:
    """Of the stack in which a matrix lies with those that are packed alike."""
    return f"{matrix.role}." + "+".join(f"{run.format_name}.{run.shape[0]}x{run.shape[1]}" for run in runs)
