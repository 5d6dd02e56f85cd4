"""How queries, keys and values come to the devices that attend with them, and how the results come back."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from strop.models.exchange import Exchange, axes_first
from strop.models.layout import AttentionView, Matrix
from strop.models.mesh import AXES, HEAD_AXES, AttentionSharding, Axis, Placement, kv_axes
from strop.models.spec import Attention
from strop.ops.attention import Rows
from strop.ops.collective import own_chunk


@dataclass(frozen=True, slots=True)
class AttentionMoves:
    """Of one layer's attention. T' rows, N' and K' heads are those with which a device attends."""

    sharding: AttentionSharding
    placement: Placement
    exchange: Exchange
    spec: Attention

    @property
    def stored_kv_axes(self) -> tuple[Axis, ...]:
        """Axes over which the weights of keys and values are stored sharded."""
        return kv_axes(self.placement, self.exchange.mesh, self.spec.num_kv_heads)

    @property
    def _kv_axes(self) -> tuple[Axis, ...]:
        """Axes over which key/value heads are sharded when they have been projected."""
        return tuple(axis for axis in self.stored_kv_axes if axis not in self.placement.rows)

    @property
    def has_own_kv_heads(self) -> bool:
        """Whether keys and values are sharded as queries are: over the heads, of which there are enough."""
        return self.sharding == "heads" and self.spec.num_kv_heads % self.exchange.mesh.size() == 0

    @property
    def spare_axes(self) -> tuple[Axis, ...]:
        """Axes whose devices have the same rows and the same weights of keys and values, of which each is to take some
        rows, since it attends with those alone."""
        if self.sharding == "heads":
            return ()
        taken = (*self.placement.rows, *self.placement.partial_in, *self._kv_axes)
        return tuple(axis for axis in AXES if axis not in taken)

    def view(self, rows: Rows) -> AttentionView:
        """See Layout.view_attention."""
        spec, n = self.spec, self.exchange.mesh.size()
        if self.sharding == "heads":
            return AttentionView(rows, spec.num_heads // n, max(1, spec.num_kv_heads // n))
        fields = own_chunk(rows.fields, AXES, 1)
        num_rows = fields.shape[1]
        first = jax.lax.axis_index(AXES).astype(jnp.int32) * num_rows
        counts = rows.counts.at[0].set(jnp.clip(rows.counts[0] - first, 0, num_rows))
        return AttentionView(Rows(fields, rows.block_tables, counts), spec.num_heads, spec.num_kv_heads)

    def bring(self, heads: list[jax.Array], kv: jax.Array | None, qkv: Matrix) -> jax.Array:
        """Queries, keys and values [T', (N' + 2 K') H].

        Args:
            heads: queries [T_rows, N_heads H], and keys and values where they are sharded as those are.
            kv: else both [T_own, 2 K_kv H], sums still to be added.
            qkv: whose bias is added.
        """
        parts = [part.reshape(part.shape[0], -1, self.spec.head_dim) for part in heads]
        placement, exchange = self.placement, self.exchange
        if self.sharding == "heads":
            parts = [exchange.join_rows(part, placement.rows[::-1], (), "attention.heads") for part in parts]
            parts += [] if kv is None else self._shared_kv(kv)
        else:
            assert kv is not None
            parts = [exchange.split_rows(part, placement.heads, placement.rows, "attention.heads") for part in parts]
            parts += self._kv_of_own_rows(kv)
        joined = jnp.concatenate(parts, axis=1)
        joined = joined.reshape(joined.shape[0], -1)
        bias = self._bias(qkv)
        return joined if bias is None else joined + bias

    def _shared_kv(self, kv: jax.Array) -> list[jax.Array]:
        """Key and value [T, 1, H] of this device's queries, where several devices share a head."""
        kv = self.exchange.sum(kv, self.placement.partial_in, "attention.kv")
        kv = self.exchange.gather(kv, self.placement.rows, 0, "attention.kv")
        kv = kv.reshape(kv.shape[0], 2, -1, self.spec.head_dim)
        head = jax.lax.axis_index(HEAD_AXES) * self.spec.num_kv_heads // self.exchange.mesh.size()
        if self._kv_axes:
            head = head - jax.lax.axis_index(self._kv_axes) * kv.shape[2]
        own = jax.lax.dynamic_slice_in_dim(kv, head, 1, 2)
        return [own[:, 0], own[:, 1]]

    def _kv_of_own_rows(self, kv: jax.Array) -> list[jax.Array]:
        """Keys and values [T', K, H] of this device's rows."""
        exchange, partial_in = self.exchange, self.placement.partial_in
        rows_over = (*self.placement.rows, *self.spare_axes)
        kv = axes_first(kv, partial_in, rows_over, exchange.mesh)
        kv = exchange.reduce_scatter(kv, partial_in, 0, "attention.kv")
        by_head = jnp.moveaxis(kv.reshape(kv.shape[0], 2, -1, self.spec.head_dim), 1, 2)  # [T, K, 2, H]
        by_head = exchange.split_rows(by_head, self._kv_axes, (*rows_over, *partial_in), "attention.kv")
        return [by_head[:, :, 0], by_head[:, :, 1]]

    def _bias(self, qkv: Matrix) -> jax.Array | None:
        """[1, (N' + 2 K') H]."""
        spec = self.spec
        if qkv.bias is None or self.sharding == "batch":
            return None if qkv.bias is None else qkv.bias[qkv.layer][None]
        by_head = qkv.bias[qkv.layer].reshape(-1, spec.head_dim)
        n, place = self.exchange.mesh.size(), jax.lax.axis_index(HEAD_AXES)
        num_kv_heads = max(1, spec.num_kv_heads // n)
        first_kv = spec.num_heads + place * spec.num_kv_heads // n
        firsts = (place * (spec.num_heads // n), first_kv, first_kv + spec.num_kv_heads)
        lengths = (spec.num_heads // n, num_kv_heads, num_kv_heads)
        parts = [jax.lax.dynamic_slice_in_dim(by_head, *part) for part in zip(firsts, lengths, strict=True)]
        return jnp.concatenate(parts).reshape(1, -1)


def bring_back(attended: jax.Array, sharding: AttentionSharding, placement: Placement, exchange: Exchange) -> jax.Array:
    """attended [T', N' H] -> [T_rows, N_heads H]."""
    if sharding == "heads":
        chunks = exchange.split_rows(attended[:, None], placement.rows[::-1], (), "attention.heads")
    else:
        chunks = attended.reshape(attended.shape[0], exchange.mesh.size(placement.heads), -1)
        chunks = exchange.join_rows(chunks, placement.heads, placement.rows, "attention.heads")
    return chunks.reshape(chunks.shape[0], -1)
