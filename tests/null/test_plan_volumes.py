"""The closed forms against the paper's expressions (as the data file quotes them), and against each other."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.core.errors import RequestError
from strop.models.mesh import MeshShape
from strop.models.published import as_multihead, published_spec, with_heads
from strop.plan.memory import kv_bytes_per_token, longest_context, weight_bytes_per_device
from strop.plan.points import LAYOUT_NAMES, paper
from strop.plan.volumes import (
    FFN_LAYOUTS,
    Collective,
    attention,
    best_gathered,
    best_gathered_elements,
    best_ws2d_elements,
    best_x,
    feed_forward,
    ffn_volume,
    model_flops_utilization,
    switch_tokens,
)

MESHES = st.builds(MeshShape, *[st.sampled_from([2, 3, 4, 8])] * 3)
DIMS = st.sampled_from([(4096, 16384), (18432, 73728), (1024, 1536)])


def value(expression: str, mesh: MeshShape, model_dim: int, ffn_dim: int, tokens: float, **more: float) -> float:
    """One of the paper's formulas, as the data file writes them in Python."""
    names = {"B": tokens, "L": 1, "E": model_dim, "F": ffn_dim, "n": mesh.size(), "sqrt": math.sqrt}
    return eval(expression, {"__builtins__": {}}, names | {"X": mesh.x, "Y": mesh.y, "Z": mesh.z} | more)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@given(mesh=MESHES, dims=DIMS, tokens=st.integers(1, 1 << 22))
def test_volumes_are_the_papers(name: str, mesh: MeshShape, dims: tuple[int, int], tokens: int) -> None:
    formulas = paper()["formulas"]["layouts"][name]
    volume = ffn_volume(LAYOUT_NAMES[name], tokens, *dims, mesh)
    assert volume.weights == pytest.approx(value(formulas["weight_elements"], mesh, *dims, tokens))
    assert volume.activations == pytest.approx(value(formulas["activation_elements"], mesh, *dims, tokens))
    listed = [value(elements, mesh, *dims, tokens) for _, _, elements in formulas["collectives"]]
    sent = [c.elements for c in feed_forward(LAYOUT_NAMES[name], tokens, dims[0], dims[1], dims[1], mesh)]
    assert sorted(sent) == pytest.approx(sorted(listed))


@given(mesh=MESHES, tokens=st.integers(1, 1 << 20))
def test_the_fused_block_of_palm(mesh: MeshShape, tokens: int) -> None:
    model_dim, ffn_dim, heads, head_dim = 18432, 73728, 64, 256
    expected = paper()["formulas"]["palm_parallel_block_ws_2d_derived"]["elements"]
    widths = 2 * ffn_dim + heads * head_dim, ffn_dim + heads * head_dim
    sent = sum(c.sent(mesh, exact=False) for c in feed_forward("ws2d", tokens, model_dim, *widths, mesh))
    assert sent == pytest.approx(value(expected, mesh, model_dim, ffn_dim, tokens, H=heads, Q=head_dim))


@given(mesh=MESHES, dims=DIMS, tokens=st.integers(1, 1 << 20), layout=st.sampled_from(FFN_LAYOUTS))
def test_exact_volumes_leave_out_what_a_device_keeps(
    mesh: MeshShape, dims: tuple[int, int], tokens: int, layout: str
) -> None:
    for c in feed_forward(layout, tokens, *dims, dims[1], mesh):  # type: ignore[arg-type]
        size = mesh.size(c.axes)
        assert c.sent(mesh, exact=True) == pytest.approx(c.elements * (size - 1) / size)
        assert c.sent(mesh, exact=False) == c.elements
    lone = MeshShape(1, 1, 1)
    assert ffn_volume(layout, tokens, *dims, lone).total == 0  # type: ignore[arg-type]


def test_an_all_reduce_is_both_halves() -> None:
    mesh = MeshShape(4, 2, 1)
    assert Collective("all_reduce", ("x",), 100).sent(mesh, exact=True) == 150
    assert Collective("all_reduce", ("z",), 100).sent(mesh, exact=False) == 0


@given(mesh=MESHES, dims=DIMS)
def test_layouts_send_the_same_where_they_change(mesh: MeshShape, dims: tuple[int, int]) -> None:
    points = paper()["formulas"]["switch_points_tokens"]
    for name in ("ws_2d_to_wg_x", "wg_x_to_wg_xy", "wg_xy_to_wg_xyz", "wg_x_to_wg_xyz", "ws_2d_to_wg_xyz"):
        first, second = (LAYOUT_NAMES[end] for end in name.split("_to_"))
        try:
            tokens = switch_tokens(first, second, *dims, mesh)
        except RequestError:  # a mesh on which the second never gains
            continue
        if tokens > 0:
            volumes = [ffn_volume(layout, tokens, *dims, mesh).total for layout in (first, second)]
            assert volumes[0] == pytest.approx(volumes[1])
        assert tokens == pytest.approx(value(points[name], mesh, *dims, 0))


def test_no_switch_point_is_an_error() -> None:
    with pytest.raises(RequestError, match="ws2d never sends less than wg_xyz"):
        switch_tokens("wg_xyz", "ws2d", 4096, 16384, MeshShape(4, 4, 4))


@pytest.mark.parametrize("num_devices", [16, 64, 256])
def test_the_best_x_is_the_best_of_all(num_devices: int) -> None:
    model_dim, ffn_dim, tokens = 4096, 16384, 512
    x = best_x(num_devices, model_dim, ffn_dim)
    assert x == 0.5 * math.sqrt(num_devices)
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    sent = {
        n: ffn_volume("ws2d", tokens, model_dim, ffn_dim, MeshShape(n, num_devices // n, 1)).total
        for n in divisors
        if 1 < n < num_devices
    }
    assert min(sent, key=sent.__getitem__) == x
    assert sent[int(x)] == best_ws2d_elements(num_devices, tokens, model_dim, ffn_dim)


def test_the_best_number_of_gathered_devices() -> None:
    model_dim, ffn_dim, mesh = 4096, 16384, MeshShape(4, 4, 4)
    tokens = 65536  # best_gathered is then x * y
    assert best_gathered(64, tokens, ffn_dim) == 16
    found = ffn_volume("wg_xy", tokens, model_dim, ffn_dim, mesh).total
    assert found == best_gathered_elements(64, tokens, model_dim, ffn_dim)


def test_attention_exchanges() -> None:
    mesh, palm = MeshShape(4, 4, 4), (64, 1, 256)
    assert attention("batch", "wg_xyz", 512, *palm, mesh) == ()
    assert attention("heads", "ws2d", 512, 64, 64, 128, mesh) == ()
    over_batch = [c.kind for c in attention("batch", "ws2d", 512, *palm, mesh)]
    assert over_batch == ["reduce_scatter", "all_to_all", "all_to_all"]
    queries = attention("batch", "ws2d", 512, *palm, mesh)[-1]
    assert queries.elements == 512 * 64 * 256 / 64


@pytest.mark.parametrize("variant", ["multihead_sharded_over_heads", "multiquery_sharded_over_heads", "over_batch"])
def test_cache_bytes(variant: str) -> None:
    spec = with_heads(published_spec("palm-540b"), 64)
    spec = as_multihead(spec, 128) if variant.startswith("multihead") else spec
    sharding = "batch" if variant.endswith("batch") else "heads"
    mesh, batch, context = MeshShape(4, 4, 4), 512, 2048
    name = "multiquery_sharded_over_batch" if sharding == "batch" else variant
    heads = spec.layers[0].attention
    names = {"n_layers": 118, "n_heads_padded": 64, "d_head": heads.head_dim, "n": 64, "B": batch}
    expected = eval(
        paper()["formulas"]["kv_cache_bytes_per_chip"][name], names | {"context": context, "bytes_per_element": 2}
    )
    assert kv_bytes_per_token(spec, sharding, mesh) * batch * context == expected
    assert longest_context(spec, sharding, mesh, batch, expected) == pytest.approx(context)


def test_weights_are_spread_over_the_mesh() -> None:
    spec = published_spec("palm-540b")
    assert weight_bytes_per_device(spec, MeshShape(4, 4, 4), "bf16") == 2 * 540_356_640_768 / 64
    assert weight_bytes_per_device(spec, MeshShape(4, 4, 4), "int8") == 540_356_640_768 / 64


def test_mfu_of_table_2() -> None:
    assert model_flops_utilization(540e9, 512 * 2048, 64, 275e12, 85.2) == pytest.approx(0.7552, abs=1e-4)
