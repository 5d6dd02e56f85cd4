"""What a mesh does not divide is said with the axis, the size, and what would."""

import pytest

from strop.core.errors import RequestError, UnsupportedError
from strop.models.mesh import PLACEMENTS, MeshShape, check_placement, check_rows, kv_axes, stored_axes
from strop.models.params import inventory
from strop.models.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, QkNorm

RMS = Norm("rms", 1e-5)


def network(
    num_heads: int = 8,
    num_kv_heads: int = 2,
    dim: int = 64,
    ffn_dim: int = 96,
    experts: Experts | None = None,
    **options: object,
) -> ModelSpec:
    attention = Attention(num_heads, num_kv_heads, 16, 0.25, None, **options)  # type: ignore[arg-type]
    layer = LayerSpec(attention, Mlp(ffn_dim, "silu"), RMS, RMS, experts=experts)
    return ModelSpec(dim, 50, (layer, layer), RMS, True, 64)


def test_mesh_shapes() -> None:
    assert [MeshShape.parse(text) for text in ("8", "2x4", "2x2x3")] == [(8, 1, 1), (2, 4, 1), (2, 2, 3)]
    assert str(MeshShape(2, 4)) == "2x4x1"
    for text in ("", "2x", "0x4", "-1", "2x2x2x2", "2*4", "two", "9999999999"):
        with pytest.raises(RequestError, match="accepted are one to three numbers of devices"):
            MeshShape.parse(text)


@pytest.mark.parametrize(
    ("spec", "layout", "mesh", "wanted"),
    [
        (network(), "ws1d", (3, 1, 1), "model_dim=64 does not divide over the 3 .*axis x=3 .* 16, 32 or 64 devices"),
        (network(ffn_dim=100), "ws2d", (2, 2, 2), "ffn_dim=100 .* 8 devices of the mesh's x=2, y=2, z=2: axis x=2 is"),
        (network(num_heads=12), "ws2d", (2, 4, 1), "num_heads=12 .*: axis x=2 .*; 1, 2, 3, 4, 6 or 12 devices"),
        (network(24, 6), "ws1d", (4, 1, 1), "num_kv_heads=6 does not go with .*x=4.* accepted are 1, 2, 3 or 6"),
        (network(dim=68), "wg_xyz", (8, 1, 1), "model_dim=68 .*axis x=8"),
        (network(experts=Experts(4, 2, True)), "ws1d", (2, 1, 1), r"experts \(num_experts=4\) is not partitioned"),
        (network(alibi_scale=1.0), "ws1d", (2, 1, 1), "alibi_scale=1.0 is not sharded over heads: shard it over the"),
        (network(qk_norm=QkNorm(RMS, "all_heads")), "ws1d", (2, 1, 1), "qk_norm over='all_heads' is not sharded"),
    ],
)  # fmt: skip
def test_what_does_not_divide(spec: ModelSpec, layout: str, mesh: tuple[int, int, int], wanted: str) -> None:
    with pytest.raises(UnsupportedError, match=wanted):
        check_placement(spec, PLACEMENTS[layout], MeshShape(*mesh))  # type: ignore[index]
    check_placement(network(), PLACEMENTS[layout], MeshShape(2, 2, 2))  # type: ignore[index]


def test_attention_over_the_batch_asks_less_of_heads() -> None:
    for spec in (network(alibi_scale=1.0), network(24, 6), network(sinks=True)):
        check_placement(spec, PLACEMENTS["ws2d"], MeshShape(2, 2, 2), "batch")
    with pytest.raises(UnsupportedError, match="num_heads=6"):
        check_placement(network(6, 6), PLACEMENTS["ws2d"], MeshShape(2, 2, 2), "batch")
    check_placement(network(6, 6), PLACEMENTS["wg_xyz"], MeshShape(2, 2, 1), "batch")


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedError, match=r"a step's rows=12 .* axis y=4 is the first .*: pad the step"):
        check_rows(12, ("x", "y"), MeshShape(2, 4))
    check_rows(16, ("x", "y"), MeshShape(2, 4))


def test_keys_and_values_are_stored_over_as_many_axes_as_they_have_heads() -> None:
    mesh = MeshShape(2, 4, 2)
    stored = [kv_axes(PLACEMENTS["ws2d"], mesh, heads) for heads in (1, 2, 4, 8, 16)]
    assert stored == [(), ("z",), ("z",), ("z", "y"), ("z", "y")]
    params = inventory(network())
    axes = {
        role: stored_axes(params[path], PLACEMENTS["wg_xy"], mesh, 2)
        for role, path in {"q": "layers.0.q", "k": "layers.0.k", "down": "layers.0.down", "embed": "embed"}.items()
    }
    assert axes == {
        "q": (("z", "y"), ("x",)),
        "k": (("z",), ("x",)),
        "down": (("x",), ("z", "y")),
        "embed": (("x", "y", "z"), ()),
    }
    assert stored_axes(params["layers.0.mlp_norm"], PLACEMENTS["ws2d"], mesh, 2) == ((),)
