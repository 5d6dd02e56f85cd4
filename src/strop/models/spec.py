"""A network as data: sum types per layer, no family names, no jax.

Letters as in docs/glossary.md: D model, F ffn, N query heads, K kv heads, H head dim, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / rms(x) * weight, accumulated in float32 (Zhang & Sennrich 2019)."""

    eps: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions on the first `rotary_dim` of each head, halves rotated against each other (Su et al. 2021)."""

    theta: float
    rotary_dim: int
    inv_freq_scale: tuple[float, ...] | None = None
    """Per-frequency multiplier [rotary_dim // 2] (linear and llama3 scaling fold into it); None means 1."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal self-attention over a paged cache, grouped queries (Ainslie et al. 2023)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    window_len: int | None = None
    """Keys visible to a query, itself included; None means all before it."""


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """act(x Wg) * (x Wu), then Wd (Shazeer 2020)."""

    ffn_dim: int
    activation: Literal["silu"]
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Pre-norm residual block: attention, then MLP."""

    norm: RmsNorm
    attention: Attention
    mlp: GatedMlp


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer."""

    model_dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: RmsNorm
    tied_embeddings: bool
    max_context_len: int

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)
