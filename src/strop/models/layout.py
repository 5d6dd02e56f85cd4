"""Where a network runs: how the decoder's heavy work goes to devices. One here; several in strop.models.partition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from strop.core.config import KvDtype
from strop.models.spec import Attention, Mlp
from strop.ops.attention import Rows
from strop.ops.dispatch import Platform
from strop.ops.embed import embed
from strop.ops.linear import linear
from strop.ops.norm import Norm, add_norm
from strop.ops.weights import AnyWeight


class Matrix(NamedTuple):
    """One matrix of a stack, and its bias."""

    weight: AnyWeight
    at: int
    """Which one."""
    layer: int = 0
    """Row of the bias."""
    bias: jax.Array | None = None
    """float32 [L, N]."""


class AttentionIn(NamedTuple):
    """What a layer's attention makes of its input."""

    spec: Attention
    norm: Norm | None
    qkv: Matrix
    kv: Matrix | None
    """Of keys and values, where they are not in `qkv`."""


class MlpIn(NamedTuple):
    """What a layer's MLP makes of its input."""

    spec: Mlp
    norm: Norm | None
    """The very object of the attention, if they share it."""
    gate_up: Matrix


class AttentionView(NamedTuple):
    """The part of attention that a device computes."""

    rows: Rows
    num_heads: int
    num_kv_heads: int


class Layout(Protocol):
    """The points of a network where its devices may exchange something; between them, each works by itself.

    x is the residual stream, as the layout shards it; on one device float32 [T, D].
    """

    @property
    def platform(self) -> Platform:
        """Of every device."""

    @property
    def block_len(self) -> int:
        """Tokens of a cache's block."""

    @property
    def kv_dtype(self) -> KvDtype:
        """Of the cache."""

    def embed(
        self, rows: Rows, table: AnyWeight, positions: AnyWeight | None, *, scale: float, bias: jax.Array | None
    ) -> jax.Array:
        """x: the rows' tokens, scaled, plus `bias` [1, D] and learned positions."""

    def project_in(
        self, x: jax.Array, counts: jax.Array, attention: AttentionIn | None, mlp: MlpIn | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Queries, keys and values for the view of `view_attention`, and the MLP's activations, as `project_out` takes
        them. Both at once (a parallel block) share what they exchange."""

    def view_attention(self, rows: Rows, spec: Attention) -> AttentionView:
        """What `attention` is to compute here."""

    def project_out(
        self,
        counts: jax.Array,
        attended: tuple[jax.Array, Matrix] | None,
        activated: tuple[jax.Array, Matrix] | None,
        *,
        scale: float = 1.0,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """residual + scale * (attended @ Wo.T + activated @ Wd.T), of those given: like x."""

    def add_norm(
        self,
        x: jax.Array,
        norm: Norm | None,
        counts: jax.Array,
        *,
        scale: float = 1.0,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """residual + scale * norm(x)."""

    def head(
        self,
        x: jax.Array,
        matrix: Matrix,
        norm: Norm | None,
        counts: jax.Array,
        *,
        num_outputs: int,
        row_ids: jax.Array | None,
        scale: float,
        soft_cap: float | None,
    ) -> jax.Array:
        """float32 [R, num_outputs] on every device, of the rows `row_ids` [R] or of all."""


@dataclass(frozen=True, slots=True)
class Single:
    """Everything on one device."""

    platform: Platform
    block_len: int = 32
    kv_dtype: KvDtype = "bf16"

    def embed(
        self, rows: Rows, table: AnyWeight, positions: AnyWeight | None, *, scale: float, bias: jax.Array | None
    ) -> jax.Array:
        """See Layout."""
        x = embed(rows.fields[0], table, rows.counts, platform=self.platform, scale=scale, bias=bias)
        if positions is None:
            return x
        return embed(rows.fields[1], positions, rows.counts, platform=self.platform, residual=x)

    def project_in(
        self, x: jax.Array, counts: jax.Array, attention: AttentionIn | None, mlp: MlpIn | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """See Layout."""
        qkv = activated = None
        if attention is not None:
            qkv = multiply(x, attention.qkv, counts, self.platform, norm=attention.norm)
        if mlp is not None:
            activation, gated = mlp.spec.activation, mlp.spec.gated
            activated = multiply(
                x, mlp.gate_up, counts, self.platform, norm=mlp.norm, activation=activation, gated=gated
            )
        return qkv, activated

    def view_attention(self, rows: Rows, spec: Attention) -> AttentionView:
        """See Layout."""
        return AttentionView(rows, spec.num_heads, spec.num_kv_heads)

    def project_out(
        self,
        counts: jax.Array,
        attended: tuple[jax.Array, Matrix] | None,
        activated: tuple[jax.Array, Matrix] | None,
        *,
        scale: float = 1.0,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """See Layout."""
        return add_products((attended, activated), counts, self.platform, scale=scale, residual=residual)

    def add_norm(
        self,
        x: jax.Array,
        norm: Norm | None,
        counts: jax.Array,
        *,
        scale: float = 1.0,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """See Layout."""
        return add_norm(x, norm, counts, platform=self.platform, scale=scale, residual=residual)

    def head(
        self,
        x: jax.Array,
        matrix: Matrix,
        norm: Norm | None,
        counts: jax.Array,
        *,
        num_outputs: int,
        row_ids: jax.Array | None,
        scale: float,
        soft_cap: float | None,
    ) -> jax.Array:
        """See Layout."""
        del num_outputs
        return multiply(
            x, matrix, counts, self.platform,
            norm=norm, scale=scale, soft_cap=soft_cap, count_index=1, row_ids=row_ids,
        )  # fmt: skip


def multiply(x: jax.Array, matrix: Matrix, counts: jax.Array, platform: Platform, **fused: Any) -> jax.Array:
    """`linear` with this matrix and its bias."""
    return linear(
        x,
        matrix.weight,
        matrix.at,
        counts,
        platform=platform,
        layer=matrix.layer,
        bias=matrix.bias,
        **fused,
    )


def add_products(
    products: Sequence[tuple[jax.Array, Matrix] | None],
    counts: jax.Array,
    platform: Platform,
    *,
    scale: float = 1.0,
    residual: jax.Array | None = None,
) -> jax.Array:
    """residual + scale * the sum of the products given."""
    for product in products:
        if product is not None:
            residual = multiply(*product, counts, platform, scale=scale, residual=residual)
    assert residual is not None
    return residual
