"""How long a pass through a partitioned network takes.

Bytes, FLOPs and exchanges are counted; six coefficients say how far from the hardware's peaks real programs stay. They
hold for all networks, layouts and batches of one kind of hardware, and `Coefficients()` is the ideal machine.

Times compose as the programs of Pope et al. 2022 run (section 3.5, and the code released with it):
- A product streams its weights while it multiplies: hypot(multiplying, streaming), between their maximum and sum.
- An exchange beside a product is looped with it in S blocks, as a pipeline of two stages: max(a, b) + min(a, b) / S.
- Exchanges over several axes go axis by axis. A ring sends both ways round, an open line one way; gathered weights
  snake through the whole mesh one way, in as many blocks as devices.
- All else adds up: attention, exchanges not beside a product, a latency per block sent and one per kernel.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from strop.core.errors import RequestError, UnsupportedError
from strop.machine.catalog import Device
from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.spec import LayerSpec, ModelSpec
from strop.plan.memory import ITEM_BYTES
from strop.plan.volumes import GATHERED, Collective, FfnLayout, attention, feed_forward, keys_with_queries

ACTIVATION_BYTES = 2
SCORE_BYTES = 12
"""Of one score of a prompt's attention that goes through memory: float32 written and read, its bf16 share likewise."""
LOGIT_BYTES = 4
PARALLEL_KERNELS = 7
"""Norm (with the residual sum before it), product in, rotation, scores, weighted sum, activation, product out."""
SERIAL_KERNELS = 10
"""The MLP has a norm and two products of its own."""
KV_KERNELS = 1
"""Keys and values, where they are not made with the queries."""
HEAD_KERNELS = 5
"""Embedding, norm, product, sampling's masks and its choice."""
STAGE_KERNELS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 2}
"""Of an exchange over one axis; an all-to-all rearranges what it sends."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """How near to its peaks hardware runs, and what it costs to begin."""

    matmul_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    multihead_cache_efficiency: float = 1.0
    """Of reading keys and values of which a device has a head to itself per query head: one row at a time."""
    link_efficiency: float = 1.0
    send_latency_s: float = 0.0
    """Of each block that a device passes on: K - 1 in an exchange among K."""
    launch_latency_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("matmul_efficiency", "memory_efficiency", "multihead_cache_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise RequestError(f"{name}={getattr(self, name)!r} is not above 0 and at most 1: calibrate again")
        for name in ("send_latency_s", "launch_latency_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(f"{name}={getattr(self, name)!r} is not 0 or a positive number: calibrate again")


class Placed(NamedTuple):
    """How a network lies on devices."""

    device: Device
    mesh: MeshShape
    layout: FfnLayout
    sharding: AttentionSharding
    weight_dtype: str = "bf16"
    """As stored and sent; products are of bf16."""


class Pass(NamedTuple):
    """One pass through the network: `batch` sequences of `new_tokens`, each of which sees `context_len` tokens."""

    batch: int
    new_tokens: int
    context_len: int

    @property
    def tokens(self) -> int:
        """Rows, B L."""
        return self.batch * self.new_tokens


class Seconds(NamedTuple):
    """Where a pass spends its time."""

    products: float
    """Weights multiplied and streamed."""
    attention: float
    links: float
    """What exchanges add to the products that they are looped with, and those that are looped with none."""
    latency: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)

    def times(self, count: float) -> "Seconds":
        """As often."""
        return Seconds(count * self.products, count * self.attention, count * self.links, count * self.latency)

    def plus(self, other: "Seconds") -> "Seconds":
        """One after the other."""
        return Seconds(
            self.products + other.products,
            self.attention + other.attention,
            self.links + other.links,
            self.latency + other.latency,
        )


class Term(NamedTuple):
    """One operation or exchange of a pass, as every device does it."""

    name: str
    seconds: Seconds
    flops: float = 0.0
    num_bytes: float = 0.0
    """Of its memory, read or written."""
    sent_bytes: float = 0.0


def total_of(terms: Iterable[Term]) -> Seconds:
    """All of them, one after the other."""
    return reduce(Seconds.plus, (term.seconds for term in terms), Seconds(0.0, 0.0, 0.0, 0.0))


def layers_latency(spec: ModelSpec, step: Pass, placed: Placed, coefficients: Coefficients) -> Seconds:
    """Seconds of all layers, without embedding, head and sampling."""
    total = Seconds(0.0, 0.0, 0.0, 0.0)
    for layer, count in Counter(spec.layers).items():
        total = total.plus(layer_latency(spec.model_dim, layer, step, placed, coefficients).times(count))
    return total


def layer_latency(model_dim: int, layer: LayerSpec, step: Pass, placed: Placed, coefficients: Coefficients) -> Seconds:
    """Seconds of one layer: all of `layer_terms`, which see."""
    return total_of(layer_terms(model_dim, layer, step, placed, coefficients))


def layer_terms(model_dim: int, layer: LayerSpec, step: Pass, placed: Placed, coefficients: Coefficients) -> list[Term]:
    """What one layer does.

    Raises:
        UnsupportedError: it is a mixture of experts, which is not modelled.
        RequestError: the mesh has more axes than the device's torus, or the device no links.
    """
    if layer.experts is not None:
        raise UnsupportedError(
            f"a mixture of experts (num_experts={layer.experts.num_experts}) is not modelled: plan for another network"
        )
    clock = _Clock(placed, coefficients)
    heads, mlp = layer.attention, layer.mlp
    head_width = heads.num_heads * heads.head_dim
    kv_width = 2 * heads.num_kv_heads * heads.head_dim
    mlp_in = mlp.ffn_dim * (2 if mlp.gated else 1)
    kv_in_products = kv_width if keys_with_queries(placed.layout, heads.num_kv_heads, placed.mesh) else 0
    blocks = (
        [("", head_width + kv_in_products + mlp_in, head_width + mlp.ffn_dim)]
        if layer.parallel
        else [("attention ", head_width + kv_in_products, head_width), ("MLP ", mlp_in, mlp.ffn_dim)]
    )
    terms = [_attention(layer, step, placed, coefficients)]
    for name, in_width, out_width in blocks:
        terms += _block(name, model_dim, in_width, out_width, step, clock)
    if kv_width > kv_in_products:
        terms.append(clock.product("keys and values", step.tokens, model_dim * (kv_width - kv_in_products)))
    around = attention(
        placed.sharding,
        placed.layout,
        step.tokens,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        placed.mesh,
    )
    terms += [clock.exchange(collective) for collective in around]
    kernels = PARALLEL_KERNELS if layer.parallel else SERIAL_KERNELS
    if kv_width > kv_in_products:
        kernels += KV_KERNELS
    terms.append(Term("kernels", Seconds(0.0, 0.0, 0.0, kernels * coefficients.launch_latency_s)))
    return terms


def head_latency(spec: ModelSpec, step: Pass, placed: Placed, coefficients: Coefficients, *, rows: int) -> Seconds:
    """Seconds of embedding all tokens and of `rows` rows of logits, in float32, with one token sampled for each."""
    return total_of(head_terms(spec, step, placed, coefficients, rows=rows))


def head_terms(spec: ModelSpec, step: Pass, placed: Placed, coefficients: Coefficients, *, rows: int) -> list[Term]:
    """What embedding all tokens and `rows` rows of logits takes."""
    clock = _Clock(placed, coefficients)
    mesh, devices = placed.mesh, placed.mesh.size()
    stored = ITEM_BYTES["bf16"] * spec.vocab_size * spec.model_dim / devices
    terms = [
        clock.product("head", rows, spec.model_dim * spec.vocab_size, num_bytes=stored),
        Term("kernels", Seconds(0.0, 0.0, 0.0, HEAD_KERNELS * coefficients.launch_latency_s)),
    ]
    logits = rows * spec.vocab_size * LOGIT_BYTES / ACTIVATION_BYTES
    for collective in (
        Collective("all_reduce", ("z", "y"), step.tokens * spec.model_dim / mesh.x),
        Collective("reduce_scatter", ("x",), logits / (mesh.y * mesh.z)),
        Collective("all_to_all", ("y", "z"), logits / devices),
    ):
        terms.append(clock.exchange(collective))
    return terms


def _block(name: str, model_dim: int, in_width: int, out_width: int, step: Pass, clock: "_Clock") -> list[Term]:
    """Two products and their exchanges."""
    placed = clock.placed
    gathered = placed.mesh.size(GATHERED[placed.layout])
    products = {
        beside: clock.product(f"{name}product {beside}", step.tokens, model_dim * width, gathered)
        for beside, width in (("in", in_width), ("out", out_width))
    }
    exchanges = []
    for collective in feed_forward(placed.layout, step.tokens, model_dim, in_width, out_width, placed.mesh):
        beside = products.get(collective.beside)
        exchanges.append(clock.exchange(collective, None if beside is None else beside.seconds.products))
    return [*products.values(), *exchanges]


def _attention(layer: LayerSpec, step: Pass, placed: Placed, coefficients: Coefficients) -> Term:
    heads, device, devices = layer.attention, placed.device, placed.mesh.size()
    seen = min(step.context_len, heads.window_len or step.context_len)
    scores = step.tokens * seen * heads.num_heads / devices
    batch_shards = devices if placed.sharding == "batch" else placed.mesh.size(GATHERED[placed.layout])
    sequences, kv_heads = math.ceil(step.batch / batch_shards), math.ceil(heads.num_kv_heads * batch_shards / devices)
    cached = 2 * kv_heads * heads.head_dim * sequences * seen * ACTIVATION_BYTES
    rate = device.memory_bytes_per_s * coefficients.memory_efficiency
    cache_rate = rate
    if heads.num_kv_heads == heads.num_heads and step.new_tokens == 1:
        cache_rate = device.memory_bytes_per_s * coefficients.multihead_cache_efficiency
    flops = 4 * scores * heads.head_dim
    multiplied = flops / (device.peak("bf16") * coefficients.matmul_efficiency)
    num_bytes = scores * SCORE_BYTES if step.new_tokens > 1 else cached
    through_memory = num_bytes / (rate if step.new_tokens > 1 else cache_rate)
    return Term("attention", Seconds(0.0, multiplied + through_memory, 0.0, 0.0), flops, num_bytes)


class _Clock:
    """Times products and exchanges of one placement."""

    def __init__(self, placed: Placed, coefficients: Coefficients) -> None:
        device = placed.device
        if device.topology == "torus" and sum(size > 1 for size in placed.mesh) > device.num_torus_axes:
            raise RequestError(
                f"mesh {placed.mesh} has more axes than the torus of {device.name}, which has "
                f"{device.num_torus_axes}: set one of them to 1"
            )
        self.placed, self.coefficients = placed, coefficients
        self.closes = device.axis_closes(placed.mesh)
        self.flops_per_s = device.peak("bf16") * coefficients.matmul_efficiency
        self.memory_bytes_per_s = device.memory_bytes_per_s * coefficients.memory_efficiency
        self.link_bytes_per_s = device.link_bytes_per_s * coefficients.link_efficiency

    def product(
        self, name: str, tokens: float, num_weights: float, gathered: int = 1, num_bytes: float | None = None
    ) -> Term:
        """A product with `num_weights` weights, all devices together, each streaming `gathered` shares."""
        devices = self.placed.mesh.size()
        if num_bytes is None:
            num_bytes = num_weights * gathered / devices * ITEM_BYTES[self.placed.weight_dtype]
        flops = 2 * tokens * num_weights / devices
        seconds = math.hypot(flops / self.flops_per_s, num_bytes / self.memory_bytes_per_s)
        return Term(name, Seconds(seconds, 0.0, 0.0, 0.0), flops, num_bytes)

    def exchange(self, collective: Collective, product_s: float | None = None) -> Term:
        """What an exchange adds, looped with a product of `product_s` seconds if there is one."""
        name = f"{collective.kind.replace('_', '-')} over {''.join(collective.axes)}"
        if collective.beside != "none":
            name += f", looped with product {collective.beside}"
        sizes = [getattr(self.placed.mesh, axis) for axis in collective.axes]
        sizes = [size for size in sizes if size > 1]
        if not sizes:
            return Term(name, Seconds(0.0, 0.0, 0.0, 0.0))
        if collective.moves == "weights":
            return self._gather_weights(name, collective, product_s or 0.0, math.prod(sizes))
        links_s, sends, kernels = 0.0, 0, 0
        elements = collective.elements * (2 if collective.kind == "all_reduce" else 1)
        for stage, size in enumerate(sizes):
            sent_s = elements * ACTIVATION_BYTES * self._s_per_byte(collective.kind, size)
            sends += (size - 1) * (2 if collective.kind == "all_reduce" else 1)
            kernels += STAGE_KERNELS[collective.kind]
            if collective.kind != "all_to_all":
                elements /= size
            if stage == 0 and product_s is not None:
                links_s += _looped(product_s, sent_s, self._blocks(size)) - product_s
            else:
                links_s += sent_s
        latency_s = sends * self.coefficients.send_latency_s + kernels * self.coefficients.launch_latency_s
        sent_bytes = collective.sent(self.placed.mesh, exact=True) * ACTIVATION_BYTES
        return Term(name, Seconds(0.0, 0.0, links_s, latency_s), sent_bytes=sent_bytes)

    def _gather_weights(self, name: str, collective: Collective, product_s: float, devices: int) -> Term:
        num_bytes = collective.elements * ITEM_BYTES[self.placed.weight_dtype] * (devices - 1) / devices
        added_s = _looped(product_s, num_bytes / self._link(), devices) - product_s
        latency_s = (devices - 1) * self.coefficients.send_latency_s
        return Term(f"weights' {name}", Seconds(0.0, 0.0, added_s, latency_s), sent_bytes=num_bytes)

    def _link(self) -> float:
        if self.link_bytes_per_s <= 0:
            raise RequestError(f"{self.placed.device.name} has no links: plan for one device, or replicas")
        return self.link_bytes_per_s

    def _both_ways(self, size: int) -> bool:
        return self.closes and size > 2

    def _s_per_byte(self, kind: str, size: int) -> float:
        if kind == "all_to_all" and self.placed.device.topology == "torus":
            return (size - 1) / 2 / self._link()  # a block for the r-th neighbour passes r links, one way round
        return (size - 1) / size / self._link() / (2 if self._both_ways(size) else 1)

    def _blocks(self, size: int) -> int:
        return size // 2 if self._both_ways(size) else size


def _looped(one_s: float, other_s: float, blocks: int) -> float:
    """A pipeline of two stages over so many blocks."""
    return max(one_s, other_s) + min(one_s, other_s) / blocks
