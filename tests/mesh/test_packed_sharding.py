"""Packed weights come apart by shards and together again, byte by byte, and travel packed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from strop.core.errors import UnsupportedError
from strop.models.layout import Matrix, MlpIn
from strop.models.mesh import MeshShape
from strop.models.packed_sharding import by_shard, join_columns
from strop.models.partition import Partition
from strop.models.sharding import abstract_mesh, on_mesh
from strop.models.spec import Mlp
from strop.ops.collective import CollectiveCall
from strop.ops.dispatch import record
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS, Weight


@pytest.mark.parametrize("format_name", PACKED_FORMATS)
@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_of_columns_join_to_the_whole(format_name: str, num_shards: int) -> None:
    packed, num_tiles = PACKED_FORMATS[format_name], 2
    of_a_shard = 3 * max(packed.group_len, 2)  # whose tiles are padded in some formats, the whole's in none
    k_len = num_shards * of_a_shard
    tiles = np.random.default_rng(0).integers(0, 256, (num_tiles, packed.tile_bytes(k_len)), np.uint8)
    weight = Weight(tiles.reshape(1, -1), format_name, (num_tiles * TILE_COLUMNS, k_len))

    shards = by_shard("o", weight, (), ("x",), MeshShape(num_shards))
    assert (shards.num_shards, shards.shape) == (num_shards, (num_tiles * TILE_COLUMNS, of_a_shard))
    apart = np.stack([shards.make(i).reshape(num_tiles, -1) for i in range(num_shards)])
    assert apart.shape[2] == packed.tile_bytes(of_a_shard)
    together = join_columns(jnp.asarray(apart), format_name, of_a_shard)
    np.testing.assert_array_equal(together, tiles)


def test_weights_whose_groups_would_break_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="64 columns, packed 32 together, do not divide over 4 devices"):
        by_shard("o", Weight(np.zeros((1, 4 * 1280), np.uint8), "q4", (64, 64)), (), ("x",), MeshShape(4))


def test_gathered_weights_travel_packed() -> None:
    layout, model_dim, ffn_dim, num_rows = Partition("wg_x", MeshShape(2), platform="native"), 64, 32, 4
    first, second = (2 * ffn_dim, model_dim // 2), (model_dim // 2, ffn_dim)  # of a device, gate and up together
    num_bytes = [PACKED_FORMATS["q4"].tile_bytes(k_len) * n_len // TILE_COLUMNS for n_len, k_len in (first, second)]

    def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        counts = jnp.full(2, num_rows, jnp.int32)
        given = MlpIn(Mlp(ffn_dim, "silu"), None, Matrix(Weight(gate_up, "q4", first), 0))
        _, activated = layout.project_in(x, counts, None, given)
        assert activated is not None
        return layout.project_out(counts, None, (activated, Matrix(Weight(down, "q4", second), 0)))

    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.uint8)
    stored = [shape((1, 2 * count)) for count in num_bytes]
    specs = P("x"), P(None, "x"), P(None, "x")
    sharded = on_mesh(mlp, abstract_mesh(layout.mesh), specs, P("x"))
    with record() as calls:
        made = jax.eval_shape(sharded, jax.ShapeDtypeStruct((num_rows, model_dim), jnp.float32), *stored)
    assert made.shape == (num_rows, model_dim)
    exchanges = [call for call in calls if isinstance(call, CollectiveCall)]
    assert [(call.kind, call.dtype, call.num_bytes, call.point) for call in exchanges] == [
        ("all_gather", "uint8", count, "mlp.weights") for count in num_bytes
    ]
