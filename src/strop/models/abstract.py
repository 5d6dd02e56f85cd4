"""Parameters without numbers: with them a network's code is traced to count what it does. No device is touched."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from strop.core.errors import UnsupportedError
from strop.models.packing import packed_bytes
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.params import inventory
from strop.models.spec import ModelSpec
from strop.models.stacks import Matrix, Run, assign, distinct_ropes, stack_name, stack_runs, stack_vectors, tables
from strop.ops.dispatch import Platform
from strop.ops.weights import PACKED_FORMATS, Weight, join_parts

DENSE_DTYPES = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16, "int8": jnp.int8}
"""Formats of weights on the platform `xla`. int8 stands for whatever takes a byte per weight."""


def abstract_parameters(
    spec: ModelSpec, format_of: Callable[[str], str], platform: Platform, *, num_positions: int
) -> Parameters:
    """Shapes and dtypes (jax.ShapeDtypeStruct) of all that `forward` reads of a network.

    Args:
        format_of: a parameter's path (strop.models.params.inventory: "embed", "layers.3.up", ...) -> the format of its
            weights, a key of PACKED_FORMATS, or of DENSE_DTYPES where the platform is `xla`.
        num_positions: rotary tables reach this far.

    Raises:
        UnsupportedError: the platform has no such format.
    """
    formats: dict[str, Any] = dict(PACKED_FORMATS) if platform == "native" else dict(DENSE_DTYPES)

    def known_format(path: str) -> str:
        name = format_of(path)
        if name not in formats:
            raise UnsupportedError(f"{path}: format {name!r} is none of {platform}'s; choose from {', '.join(formats)}")
        return name

    def weight(count: int, run: Run) -> Weight:
        if platform == "xla":
            data = jax.ShapeDtypeStruct((count, *run.shape), DENSE_DTYPES[run.format_name])
            return Weight(data, "dense", run.shape)  # type: ignore[arg-type]
        data = jax.ShapeDtypeStruct((count, packed_bytes(run.format_name, *run.shape)), jnp.uint8)
        return Weight(data, run.format_name, run.shape)  # type: ignore[arg-type]

    def whole(runs: tuple[Run, ...]) -> tuple[Run, ...]:
        """Dense arrays are of one type."""
        if platform == "native":
            return runs
        widest = max((run.format_name for run in runs), key=lambda name: jnp.dtype(DENSE_DTYPES[name]).itemsize)
        return (Run(widest, (), (sum(run.shape[0] for run in runs), runs[0].shape[1]), False),)

    infos = inventory(spec)
    runs = {member: whole(found) for member, found in stack_runs(spec, infos, known_format)}
    stacks, places = assign(spec, lambda matrix: stack_name(matrix, runs[matrix]))
    members: dict[str, Sequence[Matrix | str]] = {**stacks, **{name: [name] for name in tables(spec)}}
    weights = {name: join_parts([weight(len(some), run) for run in runs[some[0]]]) for name, some in members.items()}
    zeros = stack_vectors(spec, infos, lambda path: np.zeros(infos[path].shape, np.float32))
    vectors: Any = {name: jax.ShapeDtypeStruct(value.shape, jnp.float32) for name, value in zeros.items()}
    angles = [jax.ShapeDtypeStruct((num_positions, rope.rotary_dim // 2), jnp.float32) for rope in distinct_ropes(spec)]
    ropes: Any = tuple((table, table) for table in angles)
    return Parameters(weights, vectors, ropes, places)


def parameter_bytes(params: Parameters) -> int:
    """Of all arrays, or of what they would take."""
    leaves = jax.tree.leaves((params.weights, params.vectors))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def distinct_layers(params: Parameters, spec: ModelSpec) -> tuple[Parameters, ModelSpec, tuple[int, ...]]:
    """The network with one layer of each kind, and how many of each kind it has.

    Layers are of one kind if they do the same with matrices of like shapes and formats. Arrays stay whole.
    """
    counts: dict[Any, int] = {}
    firsts: dict[Any, int] = {}
    for i, (layer, places) in enumerate(zip(spec.layers, params.layers, strict=True)):
        kind = layer, *(_stack_of(getattr(places, one.name)) for one in fields(LayerPlaces))
        firsts.setdefault(kind, i)
        counts[kind] = counts.get(kind, 0) + 1
    kept = tuple(firsts.values())
    some = replace(params, layers=tuple(params.layers[i] for i in kept))
    return some, replace(spec, layers=tuple(spec.layers[i] for i in kept)), tuple(counts.values())


def _stack_of(place: Place | int | None) -> str | int | None:
    return place.stack if isinstance(place, Place) else place
