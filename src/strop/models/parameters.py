"""Loaded parameters as one pytree of few arrays: like matrices of all layers are stacked."""

from dataclasses import dataclass, field

import jax

from strop.ops.weights import AnyWeight


@dataclass(frozen=True, slots=True)
class Place:
    """Which matrix of which stack."""

    stack: str
    index: int


@dataclass(frozen=True, slots=True)
class LayerPlaces:
    """Where one layer's matrices lie. Layers of unlike formats or shapes lie in different stacks."""

    qkv: Place
    o: Place
    gate_up: Place
    """Just up, where nothing gates; the first of the experts, where there are several."""
    down: Place
    router: Place | None
    rope: int | None
    """Which pair of rope tables."""
    kv: Place | None = None
    """Keys and values, where `qkv` has queries alone (strop.models.sharding)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parameters:
    """Everything `forward` reads."""

    weights: dict[str, AnyWeight]
    """By stack name; always "embed", and "head" unless the embeddings are tied; "positions" if they are learned."""
    vectors: dict[str, jax.Array]
    """float32 [L, len]: attention_norm, mlp_norm, final_norm [1, D], and the biases the spec has."""
    ropes: tuple[tuple[jax.Array, jax.Array], ...]
    """cos, sin [positions, rotary_dim / 2], one pair per distinct Rope."""
    layers: tuple[LayerPlaces, ...] = field(metadata={"static": True})
