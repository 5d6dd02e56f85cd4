"""A network as data: sum types per layer, no family names, no jax.

Letters as in docs/glossary.md: D model, F ffn, N query heads, K kv heads, H head dim, V vocabulary, E experts.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""gelu is x Phi(x); gelu_tanh its approximation by tanh (Hendrycks & Gimpel 2016)."""


@dataclass(frozen=True, slots=True)
class Norm:
    """rms: x / rms(x) * weight (Zhang & Sennrich 2019). layer: (x - mean) / deviation * weight + bias (Ba et al. 2016).

    In float32.
    """

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    weight_offset: float = 0.0
    """Added to the stored weight; Gemma stores weight - 1."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions on the first `rotary_dim` of each head, halves rotated against each other (Su et al. 2021)."""

    theta: float
    rotary_dim: int
    inv_freq_scale: tuple[float, ...] | None = None
    """Per-frequency multiplier [rotary_dim // 2] (linear, llama3, yarn and longrope scaling fold into it)."""
    amplitude: float = 1.0
    """Factor of cos and sin (yarn, longrope)."""
    long_inv_freq_scale: tuple[float, ...] | None = None
    """The multiplier where contexts may exceed `original_context_len` (longrope)."""
    original_context_len: int = 0


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Normalises queries and keys before they are rotated."""

    norm: Norm
    over: Literal["head", "each_head", "all_heads"]
    """Each head by itself, with one weight [H] for all heads or a weight for each; or all heads of a token together."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention over a paged cache, grouped queries (Ainslie et al. 2023)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    window_len: int | None = None
    """Keys visible to a query, itself included; None means all before it."""
    qk_norm: QkNorm | None = None
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap)."""
    alibi_scale: float | None = None
    """Factor of a bias on the scores that falls with distance, a slope per head (Press et al. 2022); None: no bias."""
    sinks: bool = False
    """A learned score per head that takes its share of the softmax and gives nothing."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """act(x Wu) Wd, or, gated, (act(x Wg) * (x Wu)) Wd (Shazeer 2020)."""

    ffn_dim: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer has several MLPs, and each token uses the few that a router scores highest (Shazeer et al. 2017)."""

    num_experts: int
    num_active: int
    normalise: bool
    """Whether the weights of the chosen experts, out of a softmax over all, are scaled to sum to 1."""
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A residual block: x += attention(norm(x)), x += mlp(norm(x)), with the norms it has."""

    attention: Attention
    mlp: Mlp
    attention_norm: Norm | None
    mlp_norm: Norm | None
    """When `parallel` and None, the MLP shares the attention's norm."""
    attention_out_norm: Norm | None = None
    """On what attention adds to x."""
    mlp_out_norm: Norm | None = None
    parallel: bool = False
    """Both read the same x: x += attention(norm(x)) + mlp(norm(x))."""
    norm_after: bool = False
    """x = out_norm(x + attention(x)), as the first transformers did: the out norms then apply to the sum."""
    residual_scale: float = 1.0
    """Factor of what each branch adds."""
    experts: Experts | None = None
    """Then `mlp` is one of them."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A transformer: a decoder, or, if not causal, an encoder without a head."""

    model_dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: Norm | None
    tied_embeddings: bool
    max_context_len: int
    causal: bool = True
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    num_positions: int = 0
    """Rows of a learned table that is added to the embedding; 0 if there is none."""
    num_token_types: int = 0
    """Rows of a table whose first is added to the embedding; 0 if there is none."""
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)
