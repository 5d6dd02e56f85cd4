"""What partition layouts send: the closed forms of Pope et al. 2022, sections 3.2, 3.3 and appendix A.

Volumes are numbers sent by each device ("elements"; times bytes per element). Letters as in the paper: B sequences of L
tokens, model dimension E, feed-forward dimension F, a mesh of X x Y x Z = n devices, K devices in one collective. An
all-gather is charged its output per device, a reduce-scatter its input, each times (K-1)/K, which the paper drops.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from strop.core.errors import RequestError
from strop.models.mesh import AXES, PLACEMENTS, AttentionSharding, Axis, MeshShape

FfnLayout = Literal["ws1d", "ws2d", "wg_x", "wg_xy", "wg_xyz"]
FFN_LAYOUTS: tuple[FfnLayout, ...] = get_args(FfnLayout)
"""Weight-stationary in one and in two dimensions; weights stored as in two, and gathered over some axes."""

GATHERED: dict[FfnLayout, tuple[Axis, ...]] = {name: PLACEMENTS[name].rows for name in FFN_LAYOUTS}
"""The axes over which weights are gathered, and sequences sharded."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One exchange, by every device."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    axes: tuple[Axis, ...]
    """Those that carry most first."""
    elements: float
    """Per device: output of an all-gather, input of the others."""
    moves: Literal["weights", "activations"] = "activations"
    beside: Literal["in", "out", "none"] = "none"
    """The matrix product that it can be looped with, block by block."""

    def sent(self, mesh: MeshShape, *, exact: bool) -> float:
        """Elements sent per device; exact: with (K-1)/K, as the paper's figures are without."""
        size = mesh.size(self.axes)
        share = (size - 1) / size if exact else float(size > 1)
        return self.elements * share * (2 if self.kind == "all_reduce" else 1)


class Volume(NamedTuple):
    """Elements sent per device."""

    weights: float
    activations: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.weights + self.activations


def feed_forward(
    layout: FfnLayout, tokens: float, model_dim: int, in_width: int, out_width: int, mesh: MeshShape
) -> tuple[Collective, ...]:
    """The exchanges of two products, [E, in_width] and [out_width, E], on `tokens` = B L rows.

    A feed-forward layer of two matrices has both widths F (A.2). The gated, parallel block of PaLM has 2F + HQ and
    F + HQ: queries are made with the first product and the attention's output goes through the second (section 3.4).
    """
    x, yz = mesh.x, mesh.y * mesh.z
    if layout == "ws1d":  # section 3.2.1
        return (
            Collective("all_gather", ("x", "y", "z"), tokens * model_dim, beside="in"),
            Collective("reduce_scatter", ("x", "y", "z"), tokens * model_dim, beside="out"),
        )
    if layout == "ws2d":  # section 3.2.2, A.2.1
        return (
            Collective("all_gather", ("z", "y"), tokens * model_dim / x),
            Collective("reduce_scatter", ("x",), tokens * in_width / yz, beside="in"),
            Collective("all_gather", ("x",), tokens * out_width / yz, beside="out"),
            Collective("reduce_scatter", ("z", "y"), tokens * model_dim / x),
        )
    axes = GATHERED[layout]  # section 3.2.3, A.2.2
    gathered, rest = mesh.size(axes), head_axes(layout)[::-1]
    share = model_dim * gathered / mesh.size()
    weights = (
        Collective("all_gather", axes, in_width * share, moves="weights", beside="in"),
        Collective("all_gather", axes, out_width * share, moves="weights", beside="out"),
    )
    if not rest:
        return weights
    rows = tokens * model_dim / gathered
    return (Collective("all_gather", rest, rows), *weights, Collective("reduce_scatter", rest, rows))


def head_axes(layout: FfnLayout) -> tuple[Axis, ...]:
    """The axes that are left to shard heads over: all but those over which sequences are sharded."""
    return tuple(axis for axis in AXES if axis not in GATHERED[layout])


def keys_with_queries(layout: FfnLayout, num_kv_heads: int, mesh: MeshShape) -> bool:
    """Whether keys and values are made by the same product as queries: there is a head of them for every device."""
    return num_kv_heads >= mesh.size(head_axes(layout))


def attention(
    sharding: AttentionSharding,
    layout: FfnLayout,
    tokens: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mesh: MeshShape,
) -> tuple[Collective, ...]:
    """The exchanges around attention, on `tokens` = B L new rows (section 3.3).

    Keys and values of fewer heads than devices are made from the rows that a device has. Where weights stay, the model
    dimension lies over x (in 1D that of activations, in the paper's released code), which leaves sums over x; they are
    then gathered (sharding over heads) or left sharded (over the batch). Sharding over the batch brings queries from
    heads to sequences, and the result back, by an all-to-all each. Axes over which weights are gathered have sharded
    the sequences already.
    """
    gathered, rest = GATHERED[layout], head_axes(layout)
    if not rest:
        return ()
    kv_elements = 2.0 * num_kv_heads * head_dim * tokens / mesh.size(gathered)
    if sharding == "batch":
        queries = Collective("all_to_all", rest, tokens * num_heads * head_dim / mesh.size())
        if gathered:
            return queries, queries
        return Collective("reduce_scatter", ("x",), kv_elements / (mesh.y * mesh.z)), queries, queries
    if keys_with_queries(layout, num_kv_heads, mesh):
        return ()
    rows = Collective("all_gather", ("z",), kv_elements)
    return (rows,) if gathered else (Collective("all_reduce", ("x",), kv_elements / mesh.z), rows)


def ffn_volume(
    layout: FfnLayout, tokens: float, model_dim: int, ffn_dim: int, mesh: MeshShape, *, exact: bool = False
) -> Volume:
    """Elements sent per device by one feed-forward layer of two matrices (Figure 3)."""
    found = {"weights": 0.0, "activations": 0.0}
    for collective in feed_forward(layout, tokens, model_dim, ffn_dim, ffn_dim, mesh):
        found[collective.moves] += collective.sent(mesh, exact=exact)
    return Volume(**found)


def least_volume_layout(
    tokens: float, model_dim: int, ffn_dim: int, mesh: MeshShape, layouts: tuple[FfnLayout, ...] = FFN_LAYOUTS[1:]
) -> FfnLayout:
    """The layout that sends least; of equal ones the first (Figure 3)."""
    return min(layouts, key=lambda layout: ffn_volume(layout, tokens, model_dim, ffn_dim, mesh).total)


def switch_tokens(
    first: FfnLayout, second: FfnLayout, model_dim: int, ffn_dim: int, mesh: MeshShape, *, exact: bool = False
) -> float:
    """Tokens B L above which `second` sends less than `first`; volumes are linear in tokens.

    Raises:
        RequestError: both grow alike, so there is no such point.
    """
    one, two = (
        [ffn_volume(layout, tokens, model_dim, ffn_dim, mesh, exact=exact).total for tokens in (0.0, 1.0)]
        for layout in (first, second)
    )
    slope = (one[1] - one[0]) - (two[1] - two[0])
    if slope <= 0:
        raise RequestError(f"{second} never sends less than {first} on mesh {tuple(mesh)}: ask for another pair")
    return (two[0] - one[0]) / slope


def best_x(num_devices: int, model_dim: int, ffn_dim: int) -> float:
    """X of 2D weight-stationary that sends least: sqrt(n E / F), which is sqrt(n) / 2 for F = 4E (A.2.1)."""
    return math.sqrt(num_devices * model_dim / ffn_dim)


def best_ws2d_elements(num_devices: int, tokens: float, model_dim: int, ffn_dim: int) -> float:
    """What 2D weight-stationary sends at that X: 4 BL sqrt(EF / n), which is 8 BL E / sqrt(n) for F = 4E (A.2.1)."""
    return 4 * tokens * math.sqrt(model_dim * ffn_dim / num_devices)


def best_gathered(num_devices: int, tokens: float, ffn_dim: int) -> float:
    """Devices to gather weights over so that least is sent: sqrt(BL n / F) (A.2.2)."""
    return math.sqrt(tokens * num_devices / ffn_dim)


def best_gathered_elements(num_devices: int, tokens: float, model_dim: int, ffn_dim: int) -> float:
    """What weight-gathered layouts send at that number: 4 E sqrt(BL F / n) (A.2.2)."""
    return 4 * model_dim * math.sqrt(tokens * ffn_dim / num_devices)


def model_flops_utilization(
    num_parameters: float, tokens: float, num_devices: int, peak_flops_per_s: float, seconds: float
) -> float:
    """MFU, 0 to 1: 2 N FLOPs per token, attention not counted, over what the devices could do (section 2)."""
    return 2 * num_parameters * tokens / (num_devices * peak_flops_per_s * seconds)
