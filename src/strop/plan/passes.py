"""How long a pass takes on one copy of a model: what the search asks, whoever predicts it."""

import operator
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple, Protocol

from strop.machine.catalog import Device
from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.published import num_parameters
from strop.models.spec import ModelSpec
from strop.plan.choose import SHARDINGS
from strop.plan.latency import (
    ACTIVATION_BYTES,
    LOGIT_BYTES,
    Coefficients,
    Pass,
    Placed,
    Term,
    head_latency,
    head_terms,
    layer_latency,
    layer_terms,
)
from strop.plan.memory import ITEM_BYTES, kv_bytes_per_token
from strop.plan.space import padded
from strop.plan.volumes import GATHERED, FfnLayout

USABLE_MEMORY = 0.9
"""Share of an accelerator's memory that is planned for; the rest is the runtime's."""


class PassTime(NamedTuple):
    """What one pass takes, and how it is partitioned."""

    seconds: float
    placed: Placed | None
    """None where one device computes it all."""


@dataclass(frozen=True, slots=True)
class CardRow:
    """An operation or exchange, all its occurrences in a pass together, on each device."""

    name: str
    count: int
    flops: float
    memory_bytes: float
    sent_bytes: float
    seconds: float
    """That it adds: an exchange looped with a product adds what the product does not hide."""
    binds: str


class Network:
    """What the search needs to know of a network, counted once."""

    def __init__(self, spec: ModelSpec, num_devices: int) -> None:
        self.spec = padded(spec, num_devices)
        self.layers = tuple(Counter(self.spec.layers).items())
        self.num_parameters = num_parameters(spec)
        """Without heads of zeros that were added for these devices."""
        self.num_stored = num_parameters(self.spec)
        self.num_heads = max(layer.attention.num_heads for layer, _ in self.layers)
        self.widest = max(
            layer.attention.num_heads * layer.attention.head_dim + (2 if layer.mlp.gated else 1) * layer.mlp.ffn_dim
            for layer, _ in self.layers
        )
        """Numbers that a layer's first product makes of a row."""


class PassModel(Protocol):
    """One copy of a model with its weights stored one way: what it holds, and what its passes take."""

    @property
    def network(self) -> Network:
        """That it computes."""
        ...

    @property
    def device(self) -> Device:
        """Of which it takes some."""
        ...

    @property
    def mesh(self) -> MeshShape:
        """In which they lie."""
        ...

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        ...

    @property
    def weight_dtype(self) -> str:
        """Of the stored weights."""
        ...

    @property
    def weight_bytes(self) -> float:
        """Of each device."""
        ...

    @property
    def cache_bytes_per_token(self) -> dict[AttentionSharding, float]:
        """That a sequence takes of each device that holds it."""
        ...

    @property
    def usable_bytes(self) -> float:
        """Of each device's memory, for weights, cache and activations."""
        ...

    def activation_bytes(self, rows: int, batch: int) -> float:
        """Of each device, for passes of at most so many rows and sequences."""
        ...

    def pass_time(self, step: Pass) -> PassTime:
        """The fastest way to run it, one token sampled for each sequence."""
        ...

    def card_rows(self, step: Pass, time: PassTime) -> list[CardRow]:
        """The operations and exchanges of a pass."""
        ...

    def parts(self, step: Pass, time: PassTime) -> dict[str, float]:
        """Seconds of a pass by what they wait for: compute, weights, cache, links, overhead."""
        ...


@dataclass(frozen=True)
class Partitioned:
    """A copy over a mesh of accelerators, by strop.plan.latency."""

    network: Network
    device: Device
    mesh: MeshShape
    layouts: tuple[FfnLayout, ...]
    """That store weights alike: a pass may use any of them."""
    weight_dtype: str
    coefficients: Coefficients

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return self.mesh.size()

    @cached_property
    def weight_bytes(self) -> float:
        """Of each device; vectors are left out."""
        return ITEM_BYTES[self.weight_dtype] * self.network.num_stored / self.num_devices

    @cached_property
    def cache_bytes_per_token(self) -> dict[AttentionSharding, float]:
        """That a sequence takes of each device that holds it: all of them, or, sharded over the batch, one."""
        spec, mesh = self.network.spec, self.mesh
        return {
            "heads": kv_bytes_per_token(spec, "heads", mesh),
            "batch": kv_bytes_per_token(spec, "batch", mesh) * self.num_devices,
        }

    @property
    def usable_bytes(self) -> float:
        """Of each device's memory."""
        return USABLE_MEMORY * self.device.memory_bytes

    def activation_bytes(self, rows: int, batch: int) -> float:
        """Rows, what a product makes of them, logits in float32.

        Gathered weights are used block by block as they come, and hardly count.
        """
        row_bytes = ACTIVATION_BYTES * (2 * self.network.spec.model_dim + self.network.widest)
        return (rows * row_bytes + LOGIT_BYTES * batch * self.network.spec.vocab_size) / self.num_devices

    def placements(self, step: Pass) -> list[Placed]:
        """The ways to run a pass: what shards sequences needs as many of them as shards.

        In decode attention may be sharded over fewer: some devices then hold none. Where sequences are sharded over
        all devices anyway, so is attention.
        """
        found = []
        for layout, sharding in product(self.layouts, SHARDINGS):
            shards = self.mesh.size(GATHERED[layout])
            if sharding == "batch" and step.new_tokens > 1:
                shards = self.num_devices
            if step.batch >= shards and not (layout == "wg_xyz" and sharding == "heads"):
                found.append(Placed(self.device, self.mesh, layout, sharding, self.weight_dtype))
        return found

    def pass_time(self, step: Pass) -> PassTime:
        """Of the placement that takes least time; of equal ones the first."""
        times = [PassTime(self.seconds(step, placed), placed) for placed in self.placements(step)]
        return min(times, key=lambda time: time.seconds)

    def seconds(self, step: Pass, placed: Placed) -> float:
        """Of all layers, embedding and head."""
        spec = self.network.spec
        total = head_latency(spec, step, placed, self.coefficients, rows=step.batch).total
        for layer, count in self.network.layers:
            total += count * layer_latency(spec.model_dim, layer, step, placed, self.coefficients).total
        return total

    def terms(self, step: Pass, placed: Placed) -> list[tuple[Term, int]]:
        """Every operation and exchange of a pass, and how often it occurs."""
        spec = self.network.spec
        found = [
            (term, count)
            for layer, count in self.network.layers
            for term in layer_terms(spec.model_dim, layer, step, placed, self.coefficients)
        ]
        head = head_terms(spec, step, placed, self.coefficients, rows=step.batch)
        return [
            *found,
            *((term._replace(name=term.name if term.name == "head" else f"head: {term.name}"), 1) for term in head),
        ]

    def parts(self, step: Pass, time: PassTime) -> dict[str, float]:
        """Seconds of a pass by what they wait for; where two things overlap, all of it is the longer one's."""
        found = dict.fromkeys(("compute", "weights", "cache", "links", "overhead"), 0.0)
        assert time.placed is not None
        for term, count in self.terms(step, time.placed):
            spent = term.seconds.times(count)
            found["links"] += spent.links
            found["overhead"] += spent.latency
            computes = operator.gt(*rooflines(term, self.device, self.coefficients))
            found["compute" if computes else "weights"] += spent.products
            found["compute" if computes else "cache"] += spent.attention
        return found

    def card_rows(self, step: Pass, time: PassTime) -> list[CardRow]:
        """Those that take or send anything."""
        assert time.placed is not None
        return [
            CardRow(
                name=term.name,
                count=count,
                flops=count * term.flops,
                memory_bytes=count * term.num_bytes,
                sent_bytes=count * term.sent_bytes,
                seconds=count * term.seconds.total,
                binds=self._binds(term),
            )
            for term, count in self.terms(step, time.placed)
            if term.seconds.total or term.flops or term.sent_bytes
        ]

    def _binds(self, term: Term) -> str:
        if term.sent_bytes:
            return "links" if term.seconds.links > term.seconds.latency else "overhead"
        if not term.flops:
            return "overhead"
        if operator.gt(*rooflines(term, self.device, self.coefficients)):
            return "compute"
        return "cache" if term.seconds.attention else "weights"


def rooflines(term: Term, device: Device, coefficients: Coefficients) -> tuple[float, float]:
    """Seconds that its FLOPs and its bytes would take by themselves."""
    return (
        term.flops / (device.peak("bf16") * coefficients.matmul_efficiency),
        term.num_bytes / (device.memory_bytes_per_s * coefficients.memory_efficiency),
    )
