"""Parameters and caches on a mesh: how they are stored for a partition layout, and where."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from strop.core.errors import UnsupportedError
from strop.models.cache import cache_groups
from strop.models.mesh import AXES, HEAD_AXES, Axis, MeshShape, check_placement, kv_axes, stored_axes
from strop.models.packed_sharding import by_shard, pad_rows, take_rows
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.params import inventory
from strop.models.partition import Partition
from strop.models.spec import LayerSpec, ModelSpec
from strop.ops.attention import new_cache
from strop.ops.collective import all_to_all
from strop.ops.weights import AnyWeight, Weight, join_parts

_TABLES = ("embed", "positions", "head")
_ALIKE = {"qkv": "q", "kv": "k", "gate_up": "up"}
"""A parameter of the inventory whose axes are those of a role's matrices."""


def make_mesh(shape: MeshShape) -> Mesh:
    """The first devices that jax has, as many of each process. Raises UnsupportedError when there are too few."""
    num_processes = jax.process_count()
    by_process = [[own for own in jax.devices() if own.process_index == i] for i in range(num_processes)]
    of_each, rest = divmod(shape.size(), num_processes)
    fewest = min(map(len, by_process))
    if rest or of_each > fewest:
        sees = (
            f"this process sees {fewest}" if num_processes == 1 else f"each of {num_processes} processes has {fewest}"
        )
        raise UnsupportedError(
            f"mesh {shape} has {shape.size()} devices, and {sees} of {jax.devices()[0].platform}: take a"
            " smaller mesh; a processor is split for trials by"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={-(-shape.size() // num_processes)}"
        )
    devices = [device for own in by_process for device in own[:of_each]]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """The same without devices, for tracing."""
    return AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_mesh(
    function: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on each device of the mesh, as jax.shard_map would have it: what is to be traced or compiled."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def hidden_spec(layout: Partition) -> P:
    """Of what `forward` returns, float32 [T, D]."""
    return P(layout.placement.rows, layout.placement.stream)


def rearranged(params: Parameters, spec: ModelSpec, layout: Partition) -> Parameters:
    """Dense parameters of one device in the order in which the layout shards them; the `shape` of a weight is that of a
    device's part. To be traced or run.

    Queries come apart from keys and values, the vocabulary is padded until the mesh divides it, and parts that are
    joined (keys and values, gate and up) lie together shard by shard.

    Raises:
        UnsupportedError: the mesh does not divide the network.
    """
    check_placement(spec, layout.placement, layout.mesh, layout.attention)
    members = _members(params)
    weights: dict[str, AnyWeight] = {}
    for name, weight in params.weights.items():
        assert isinstance(weight, Weight) and weight.format == "dense", "packed weights are shards from the start"
        weights |= _dense_rearranged(name, *members[name], weight, spec, layout)
    return replace(params, weights=weights, layers=tuple(map(_new_places, params.layers)))


def _dense_rearranged(
    name: str, role: str, layer: int, weight: Weight, spec: ModelSpec, layout: Partition
) -> dict[str, Weight]:
    """The stacks that one becomes, by name."""
    found = {}
    for part, data in _parts(role, jnp.asarray(weight.data), spec.layers[layer], layout).items():
        sizes = [layout.mesh.size(axes) for axes in _stored_axes(part, layer, spec, layout)]
        shape = data.shape[1] // sizes[0], data.shape[2] // sizes[1]
        found[_stack(part, name)] = Weight(data, "dense", shape)
    return found


def _parts(role: str, data: jax.Array, layer: LayerSpec, layout: Partition) -> dict[str, jax.Array]:
    """The stacks [L, N, K] that one becomes."""
    mesh, placement, heads = layout.mesh, layout.placement, layer.attention
    if role == "qkv":
        ends = (heads.num_heads * heads.head_dim, (heads.num_heads + heads.num_kv_heads) * heads.head_dim)
        q, k, v = jnp.split(data, ends, axis=1)
        return {"q": q, "kv": _joined([k, v], mesh.size(kv_axes(placement, mesh, heads.num_kv_heads)))}
    if role == "gate_up" and layer.mlp.gated:
        return {role: _joined(jnp.split(data, 2, axis=1), mesh.size(placement.ffn))}
    if role in _TABLES:
        return {role: jnp.pad(data, ((0, 0), (0, -data.shape[1] % mesh.size(placement.vocabulary)), (0, 0)))}
    return {role: data}


def _packed_parts(role: str, weight: AnyWeight, layer: LayerSpec, layout: Partition) -> dict[str, list[Weight]]:
    """The stacks that one becomes, each of them matrices to be sharded by themselves."""
    if role in _TABLES:
        return {role: [pad_rows(weight.parts[0], layout.mesh.size(layout.placement.vocabulary))]}
    if role != "qkv":
        return {role: [*weight.parts]}
    heads = layer.attention
    lengths = [count * heads.head_dim for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)]
    pieces, parts, first = [], list(weight.parts), 0
    for length in lengths:
        if first == parts[0].shape[0]:
            parts, first = parts[1:], 0
        pieces.append(take_rows(parts[0], first, length))
        first += length
    return {"q": pieces[:1], "kv": pieces[1:]}


def _joined(parts: list[jax.Array], num_shards: int) -> jax.Array:
    """Rows of the parts [L, N, K], those of a shard together."""
    by_shard = [part.reshape(part.shape[0], num_shards, -1, part.shape[2]) for part in parts]
    joined = jnp.concatenate(by_shard, axis=2)
    return joined.reshape(joined.shape[0], -1, joined.shape[3])


def _members(params: Parameters) -> dict[str, tuple[str, int]]:
    """The role of each stack and a layer that uses it."""
    members = {name: (name, 0) for name in _TABLES}
    for i, places in enumerate(params.layers):
        for role in ("qkv", "kv", "o", "gate_up", "down"):
            place: Place | None = getattr(places, role)
            if place is not None:
                members[place.stack] = role, i
    return members


def _new_places(places: LayerPlaces) -> LayerPlaces:
    q, kv = (replace(places.qkv, stack=_stack(part, places.qkv.stack)) for part in ("q", "kv"))
    return replace(places, qkv=q, kv=kv)


def _stack(part: str, name: str) -> str:
    """The name of a part of a stack."""
    return name.replace("qkv", part, 1) if part in ("q", "kv") else name


def _stored_axes(role: str, layer: int, spec: ModelSpec, layout: Partition) -> tuple[tuple[Axis, ...], ...]:
    """Of the rows and the columns of a stack's matrices."""
    path = role if role in _TABLES else f"layers.{layer}.{_ALIKE.get(role, role)}"
    num_kv_heads = spec.layers[layer].attention.num_kv_heads
    return stored_axes(inventory(spec)[path], layout.placement, layout.mesh, num_kv_heads)


def parameter_specs(params: Parameters, spec: ModelSpec, layout: Partition) -> Parameters:
    """The PartitionSpec of every array of parameters that are `rearranged`."""
    members = _members(params)

    def of_weight(name: str, weight: AnyWeight) -> AnyWeight:
        role, layer = members[name]
        rows, columns = _stored_axes(role, layer, spec, layout)
        specs: Any = {True: P(None, rows, columns), False: P(None, (*rows, *columns))}
        return join_parts([replace(part, data=specs[part.format == "dense"]) for part in weight.parts])

    weights: dict[str, AnyWeight] = {name: of_weight(name, weight) for name, weight in params.weights.items()}
    vectors, ropes = jax.tree.map(lambda _: P(), (params.vectors, params.ropes))
    return Parameters(weights, vectors, ropes, params.layers)


def shard(params: Parameters, spec: ModelSpec, layout: Partition, mesh: Mesh) -> Parameters:
    """Parameters of one device on a mesh. Raises UnsupportedError when it does not divide the network."""
    sharder, members = Sharder(spec, layout, mesh), _members(params)
    weights: dict[str, AnyWeight] = {}
    for name, weight in params.weights.items():
        weights |= sharder.place(name, *members[name], weight)
    return sharder.finish(replace(params, weights=weights))


class Sharder:
    """Puts parameters on a mesh, a stack at a time, so that never more than one lies beside what has been put there.

    Of a mesh over several processes, each of them gets what its own devices need.
    """

    def __init__(self, spec: ModelSpec, layout: Partition, mesh: Mesh) -> None:
        """Raises UnsupportedError when the mesh does not divide the network."""
        check_placement(spec, layout.placement, layout.mesh, layout.attention)
        self._spec, self._layout, self._mesh = spec, layout, mesh

    def place(self, name: str, role: str, layer: int, weight: AnyWeight) -> dict[str, AnyWeight]:
        """The stacks on the mesh that one stack becomes, by name; `layer` is one of those that use it.

        Raises:
            UnsupportedError: tiles or groups of packed weights would break.
        """
        spec, layout = self._spec, self._layout
        if weight.format != "dense":
            pieces = _packed_parts(role, weight, spec.layers[layer], layout)
            return {
                _stack(part, name): join_parts([self._packed(name, part, layer, piece) for piece in of_part])
                for part, of_part in pieces.items()
            }
        assert isinstance(weight, Weight)
        arranged = _dense_rearranged(name, role, layer, weight, spec, layout)
        parts = {_stack(part, name): part for part in (("q", "kv") if role == "qkv" else (role,))}
        return {
            stack: replace(one, data=self._put(one.data, P(None, *_stored_axes(parts[stack], layer, spec, layout))))
            for stack, one in arranged.items()
        }

    def finish(self, params: Parameters) -> Parameters:
        """Parameters whose weights have been placed: with all that is on every device, too."""
        vectors, ropes = jax.tree.map(lambda array: self._put(array, P()), (params.vectors, params.ropes))
        return Parameters(params.weights, vectors, ropes, tuple(map(_new_places, params.layers)))

    def _packed(self, name: str, part: str, layer: int, weight: Weight) -> Weight:
        rows, columns = _stored_axes(part, layer, self._spec, self._layout)
        shards = by_shard(name, weight, rows, columns, self._layout.mesh)

        def shard_at(index: Any) -> np.ndarray:
            return shards.make((index[1].start or 0) // shards.shard_bytes)

        where = NamedSharding(self._mesh, P(None, (*rows, *columns)))
        whole = weight.data.shape[0], shards.num_shards * shards.shard_bytes
        return Weight(jax.make_array_from_callback(whole, where, shard_at), weight.format, shards.shape)

    def _put(self, array: Any, where: P) -> jax.Array:
        sharding = NamedSharding(self._mesh, where)
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def cache_spec(layout: Partition) -> P:
    """Of a cache array."""
    if layout.attention == "batch":
        return P(None, AXES) if layout.platform == "native" else P(None, None, AXES)
    return P(None, None, HEAD_AXES) if layout.platform == "native" else P(None, None, None, None, HEAD_AXES)


def new_sharded_caches(
    spec: ModelSpec,
    layout: Partition,
    mesh: Mesh | AbstractMesh,
    num_blocks: Sequence[int],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, ...]:
    """The cache array of each group, with so many blocks on each device; in a traced function, its shape."""
    n = layout.mesh.size()

    def allocate() -> tuple[jax.Array, ...]:
        return tuple(
            new_cache(
                layout.platform,
                len(group.layers),
                count,
                group.num_kv_heads if layout.attention == "batch" else max(1, group.num_kv_heads // n),
                group.head_dim,
                layout.block_len,
                dtype,
                layout.kv_dtype,
            )
            for group, count in zip(cache_groups(spec), num_blocks, strict=True)
        )

    caches: tuple[jax.Array, ...] = jax.jit(on_mesh(allocate, mesh, (), cache_spec(layout)))()
    return caches


def to_batch_cache(cache: jax.Array, block_ids: jax.Array, num_kv_heads: int, layout: Partition) -> jax.Array:
    """A cache array that was sharded over heads, over the batch: in a shard_map, between prefill and decode.

    Args:
        cache: this device's part [L, 2, P, block_len, K', H] (xla's).
        block_ids: int32 [devices, P'], in the order of AXES: which blocks become each device's, in their new order.
        layout: of which mesh and platform count.
    """
    mesh = layout.mesh
    if num_kv_heads == 1:  # every device has all of it
        return cache[:, :, block_ids[jax.lax.axis_index(AXES)]]
    by_axis = block_ids.reshape(*mesh, -1)
    for_devices = by_axis.transpose(2, 1, 0, 3).reshape(mesh.size(), -1)  # in the order of HEAD_AXES
    chunks = jnp.moveaxis(cache[:, :, for_devices], 2, 0)  # [devices, L, 2, P', block_len, K', H]
    received = all_to_all(chunks, HEAD_AXES, platform=layout.platform, point="cache") if mesh.size() > 1 else chunks
    heads = jnp.moveaxis(received, 0, 4)
    heads = heads.reshape(*heads.shape[:4], -1, heads.shape[-1])
    return heads[:, :, :, :, :: heads.shape[4] // num_kv_heads]
