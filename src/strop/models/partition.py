"""The partition layouts of Pope et al. 2022: the points of a network at which the devices of a mesh exchange something.

The code runs on each device, inside a shard_map over the axes x, y and z. Between two points a device multiplies what it
has by its part of the weights.

    point           over                          what
    {block}.in      D's axes but the weights' D   all-gather of x: [T, D_xyz] -> [T, D_x]
    {block}.hidden  the weights' D                reduce-scatter of products, all-gather of activations: F_yz <-> F_yzx
    {block}.out     F's and heads' axes           reduce-scatter of products: [T, D_x] -> [T, D_xyz]
    {block}.weights rows' axes that store weights all-gather of weights
    attention.kv, attention.heads                 what brings keys, values, queries and results to where attention is
    norm            D's axes                      all-reduce of a number or two per row
    embed, head                                   once a step

A block is attention, mlp, or both at once: a parallel block exchanges for both together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import jax
import jax.numpy as jnp

from strop.core.config import KvDtype
from strop.models.exchange import Exchange, axes_first, own_rows
from strop.models.layout import AttentionIn, AttentionView, Matrix, MlpIn, add_products, multiply
from strop.models.mesh import (
    AXES,
    HEAD_AXES,
    PLACEMENTS,
    AttentionSharding,
    Axis,
    LayoutName,
    MeshShape,
    check_rows,
    kv_axes,
)
from strop.models.spec import Attention
from strop.ops.attention import Rows
from strop.ops.collective import all_gather, all_reduce, own_chunk, reduce_scatter
from strop.ops.dispatch import Platform
from strop.ops.embed import embed
from strop.ops.linear.reference import activate
from strop.ops.norm import Norm, add_norm
from strop.ops.weights import AnyWeight, Weight

Sent = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Partition:
    """A network on a mesh of devices: x is float32 [T_rows, D_others], for the rows' axes and all others."""

    name: LayoutName
    mesh: MeshShape
    attention: AttentionSharding = "heads"
    """heads: a device attends with its heads, in all rows; where there are fewer key/value heads than devices, several
    keep the same one. batch: with all heads, in its rows; sequences are assigned to devices, and blocks of the cache are
    numbered by each device for itself."""
    platform: Platform = "xla"
    block_len: int = 32
    kv_dtype: KvDtype = "bf16"
    sent: Sent = "float32"
    """As what activations travel; bfloat16 rounds partial sums, too."""

    @property
    def row_axes(self) -> tuple[Axis, ...]:
        """Axes over which rows are sharded, outside attention."""
        return PLACEMENTS[self.name].rows

    @property
    def x_axes(self) -> tuple[Axis, ...]:
        """Axes over which D of the residual stream is sharded: all others."""
        return tuple(axis for axis in AXES if axis not in self.row_axes)

    @property
    def in_axes(self) -> tuple[Axis, ...]:
        """Axes over which D of a weight is sharded while it is used, and sums of a first product are to be added."""
        return tuple(axis for axis in PLACEMENTS[self.name].embed if axis not in self.row_axes)

    @property
    def out_axes(self) -> tuple[Axis, ...]:
        """The same for F and the heads, and of a second product."""
        return tuple(axis for axis in PLACEMENTS[self.name].ffn if axis not in self.row_axes)

    @property
    def head_axes(self) -> tuple[Axis, ...]:
        """Axes over which queries are sharded when they have been projected, and results before they are."""
        return (*self.out_axes, *self.in_axes)

    def embed(
        self, rows: Rows, table: AnyWeight, positions: AnyWeight | None, *, scale: float, bias: jax.Array | None
    ) -> jax.Array:
        """See Layout. A device looks up what lies in its part of the vocabulary."""
        check_rows(rows.fields.shape[1], AXES if self.attention == "batch" else self.row_axes, self.mesh)
        vocabulary = PLACEMENTS[self.name].vocabulary
        fields = rows.fields if vocabulary else own_chunk(rows.fields, self.row_axes, 1)

        def look_up(ids: jax.Array, table: AnyWeight, scale: float) -> jax.Array:
            first = jax.lax.axis_index(vocabulary).astype(ids.dtype) * table.shape[0] if vocabulary else 0
            is_here = (first <= ids) & (ids < first + table.shape[0])
            counts = _all_rows(ids.shape[0])
            found = embed(jnp.where(is_here, ids - first, 0), table, counts, platform=self.platform, scale=scale)
            return jnp.where(is_here[:, None], found, 0.0)

        x = look_up(fields[0], table, scale)
        if positions is not None:
            x = x + look_up(fields[1], positions, 1.0)
        if vocabulary:
            x = self._reduce_scatter(x, self.row_axes, 0, "embed")
            x = self._reduce_scatter(x, self.x_axes, 1, "embed")
        return x if bias is None else x + own_chunk(bias, self.x_axes, 1)

    def project_in(
        self, x: jax.Array, counts: jax.Array, attention: AttentionIn | None, mlp: MlpIn | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """See Layout."""
        block = _block(attention, mlp)
        x = self._gather(x, [axis for axis in self.x_axes if axis not in self.in_axes], 1, f"{block}.in")
        source = _Source(self, x, counts)
        queries: list[jax.Array] = []
        hidden: list[jax.Array] = []
        if attention is not None:
            queries = self._queries(attention, source, block)
        if mlp is not None:
            hidden = self._hidden(mlp, source, block)
        scattered = self._scatter_together([*queries, *hidden], f"{block}.hidden")
        qkv = activated = None
        if attention is not None:
            qkv = self._to_attention(attention, scattered[: len(queries)], source, block)
        if mlp is not None:
            activated = jnp.concatenate(scattered[len(queries) :], axis=1)
            if self._is_partial:
                bias = self._hidden_bias(mlp)
                activated = activated if bias is None else activated + bias
                activated = activate(activated, mlp.spec.activation, mlp.spec.gated)
        return qkv, activated

    def view_attention(self, rows: Rows, spec: Attention) -> AttentionView:
        """See Layout."""
        if self.attention == "heads":
            n = self.mesh.size()
            return AttentionView(rows, spec.num_heads // n, max(1, spec.num_kv_heads // n))
        fields = own_chunk(rows.fields, AXES, 1)
        num_rows = fields.shape[1]
        first = jax.lax.axis_index(AXES).astype(jnp.int32) * num_rows
        counts = rows.counts.at[0].set(jnp.clip(rows.counts[0] - first, 0, num_rows))
        return AttentionView(Rows(fields, rows.block_tables, counts), spec.num_heads, spec.num_kv_heads)

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
        block = _block(attended, activated)
        if attended is not None:
            attended = self._from_attention(attended[0]), attended[1]
        given = [product for product in (attended, activated) if product is not None]
        whole = self._gather_together([y for y, _ in given], f"{block}.hidden")
        embed_axes, ffn_axes = PLACEMENTS[self.name].embed, PLACEMENTS[self.name].ffn
        matrices = [self._gathered(matrix, embed_axes, ffn_axes, 1, block) for _, matrix in given]
        counts = self._counts(counts, whole[0].shape[0])
        if self.mesh.size(self.out_axes) == 1:
            matrices = [self._with_own_bias(matrix, self.x_axes) for matrix in matrices]
            return add_products(
                list(zip(whole, matrices, strict=True)), counts, self.platform, scale=scale, residual=residual
            )
        products = [(y, matrix._replace(bias=None)) for y, matrix in zip(whole, matrices, strict=True)]
        partial = add_products(products, counts, self.platform)
        axes = [axis for axis in self.x_axes if axis not in self.in_axes]
        total = self._reduce_scatter(partial, axes, 1, f"{block}.out")
        for matrix in matrices:
            own = self._with_own_bias(matrix, self.x_axes).bias
            total = total if own is None else total + own
        total = total if scale == 1.0 else scale * total
        return total if residual is None else residual + total

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
        if norm is not None and self.mesh.size(self.x_axes) > 1:
            x, norm = self._norm(x, norm, self.x_axes), None
        counts = self._counts(counts, x.shape[0])
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
        if row_ids is None:
            x = self._gather(x, self.row_axes, 0, "head")
        elif self.mesh.size(self.row_axes) == 1:
            x = x[row_ids]
        else:
            own = row_ids - jax.lax.axis_index(self.row_axes).astype(row_ids.dtype) * x.shape[0]
            is_here = (0 <= own) & (own < x.shape[0])
            x = jnp.where(is_here[:, None], x[jnp.where(is_here, own, 0)], 0.0)
            x = all_reduce(x, self.row_axes, platform=self.platform, point="head")
        x = self._gather(x, self.x_axes, 1, "head")
        vocabulary = PLACEMENTS[self.name].vocabulary
        if matrix.bias is not None:
            padding = matrix.weight.shape[0] * self.mesh.size(vocabulary) - num_outputs
            matrix = matrix._replace(bias=jnp.pad(matrix.bias, ((0, 0), (0, padding))))
        matrix = self._with_own_bias(matrix, vocabulary)
        fused = {"norm": norm, "scale": scale, "soft_cap": soft_cap, "count_index": 1}
        logits = multiply(x, matrix, counts, self.platform, **fused)
        return all_gather(logits, vocabulary, 1, platform=self.platform, point="head")[:, :num_outputs]

    # What goes into attention and comes out of it

    def _queries(self, attention: AttentionIn, source: "_Source", block: str) -> list[jax.Array]:
        """Queries [T_rows, N_out H], and keys and values, if they are sharded alike."""
        placement = PLACEMENTS[self.name]
        matrix = self._gathered(attention.qkv, placement.ffn, placement.embed, 1, block)
        queries = [source.times(attention.norm, matrix._replace(bias=None))]
        if self._has_own_kv_heads(attention.spec):
            queries += jnp.split(source.times(attention.norm, self._kv_matrix(attention, block)), 2, axis=1)
        return queries

    def _to_attention(
        self, attention: AttentionIn, queries: list[jax.Array], source: "_Source", block: str
    ) -> jax.Array:
        """Queries, keys and values [T', (N' + 2 K') H] of the view that attention has."""
        spec = attention.spec
        by_head = [part.reshape(part.shape[0], -1, spec.head_dim) for part in queries]
        if self.attention == "heads":
            parts = [self._exchange.join_rows(part, self.row_axes[::-1], ()) for part in by_head]
            if len(parts) == 1:
                parts += self._shared_kv(attention, source, block)
        else:
            parts = [self._exchange.split_rows(part, self.head_axes, self.row_axes) for part in by_head]
            parts += self._kv_of_own_rows(attention, source, block)
        qkv = jnp.concatenate(parts, axis=1)
        qkv = qkv.reshape(qkv.shape[0], -1)
        bias = self._qkv_bias(attention)
        return qkv if bias is None else qkv + bias

    def _from_attention(self, attended: jax.Array) -> jax.Array:
        """attended [T', N' H] as the output projection takes it: [T_rows, N_(out, in) H]."""
        num_rows = attended.shape[0]
        if self.attention == "heads":
            chunks = self._exchange.split_rows(attended[:, None], self.row_axes[::-1], ())
        else:
            chunks = attended.reshape(num_rows, self.mesh.size(self.head_axes), -1)
            chunks = self._exchange.join_rows(chunks, self.head_axes, self.row_axes)
        return chunks.reshape(chunks.shape[0], -1)

    def _has_own_kv_heads(self, spec: Attention) -> bool:
        """Whether keys and values are sharded as queries are: over the heads, of which there are enough."""
        return self.attention == "heads" and spec.num_kv_heads % self.mesh.size() == 0

    def _kv_axes(self, spec: Attention) -> tuple[Axis, ...]:
        """Axes over which key/value heads are sharded when they have been projected."""
        stored = kv_axes(PLACEMENTS[self.name], self.mesh, spec.num_kv_heads)
        return tuple(axis for axis in stored if axis not in self.row_axes)

    def _kv_matrix(self, attention: AttentionIn, block: str) -> Matrix:
        """[2 K_kv H, D_in]."""
        placement = PLACEMENTS[self.name]
        stored = kv_axes(placement, self.mesh, attention.spec.num_kv_heads)
        assert attention.kv is not None, "a partitioned network keeps queries apart: see strop.models.sharding"
        return self._gathered(attention.kv._replace(bias=None), stored, placement.embed, 2, block)

    def _shared_kv(self, attention: AttentionIn, source: "_Source", block: str) -> list[jax.Array]:
        """Key and value [T, 1, H] of this device's queries, where several devices share a head."""
        spec = attention.spec
        kv = source.times(attention.norm, self._kv_matrix(attention, block))
        kv = self._sum(kv, self.in_axes, "attention.kv")
        kv = self._gather(kv, self.row_axes, 0, "attention.kv")
        kv = kv.reshape(kv.shape[0], 2, -1, spec.head_dim)
        head = jax.lax.axis_index(HEAD_AXES) * spec.num_kv_heads // self.mesh.size()
        axes = self._kv_axes(spec)
        if axes:
            head = head - jax.lax.axis_index(axes) * kv.shape[2]
        own = jax.lax.dynamic_slice_in_dim(kv, head, 1, 2)
        return [own[:, 0], own[:, 1]]

    def _kv_of_own_rows(self, attention: AttentionIn, source: "_Source", block: str) -> list[jax.Array]:
        """Keys and values [T', K, H] of this device's rows. No product is done twice: devices with the same weights
        take different rows."""
        spec, over_heads = attention.spec, self._kv_axes(attention.spec)
        spare = [axis for axis in AXES if axis not in (*self.row_axes, *self.in_axes, *over_heads)]
        kv = source.times(attention.norm, self._kv_matrix(attention, block), own=spare)
        rows_over = (*self.row_axes, *spare)
        kv = self._reduce_scatter(axes_first(kv, self.in_axes, rows_over, self.mesh), self.in_axes, 0, "attention.kv")
        by_head = jnp.moveaxis(kv.reshape(kv.shape[0], 2, -1, spec.head_dim), 1, 2)  # [T, K, 2, H]
        by_head = self._exchange.split_rows(by_head, over_heads, (*rows_over, *self.in_axes))
        return [by_head[:, :, 0], by_head[:, :, 1]]

    def _qkv_bias(self, attention: AttentionIn) -> jax.Array | None:
        """[1, (N' + 2 K') H] of the view that attention has."""
        spec, qkv = attention.spec, attention.qkv
        if qkv.bias is None or self.attention == "batch":
            return None if qkv.bias is None else qkv.bias[qkv.layer][None]
        by_head = qkv.bias[qkv.layer].reshape(-1, spec.head_dim)
        n, num_kv_heads = self.mesh.size(), max(1, spec.num_kv_heads // self.mesh.size())
        place = jax.lax.axis_index(HEAD_AXES)
        first_kv = spec.num_heads + place * spec.num_kv_heads // n
        firsts = (place * (spec.num_heads // n), first_kv, first_kv + spec.num_kv_heads)
        lengths = (spec.num_heads // n, num_kv_heads, num_kv_heads)
        parts = [jax.lax.dynamic_slice_in_dim(by_head, *part) for part in zip(firsts, lengths, strict=True)]
        return jnp.concatenate(parts).reshape(1, -1)

    # The MLP's hidden layer

    def _hidden(self, mlp: MlpIn, source: "_Source", block: str) -> list[jax.Array]:
        """Activations [T_rows, F_out]; where sums are still to be added, what goes into them: gate and up."""
        placement, num_parts = PLACEMENTS[self.name], 1 + mlp.spec.gated
        matrix = self._gathered(mlp.gate_up, placement.ffn, placement.embed, num_parts, block)
        if self._is_partial:
            return jnp.split(source.times(mlp.norm, matrix._replace(bias=None)), num_parts, axis=1)
        matrix = matrix._replace(layer=0, bias=self._hidden_bias(mlp))
        activation, gated = mlp.spec.activation, mlp.spec.gated
        return [source.times(mlp.norm, matrix, activation=activation, gated=gated)]

    def _hidden_bias(self, mlp: MlpIn) -> jax.Array | None:
        """[1, F_(out, in)] or that of gate and up."""
        _, _, layer, bias = mlp.gate_up
        if bias is None:
            return None
        return own_chunk(bias[layer].reshape(1 + mlp.spec.gated, -1), self.head_axes, 1).reshape(1, -1)

    # Exchanges

    @property
    def _is_partial(self) -> bool:
        """Whether a first product leaves sums to add up."""
        return self.mesh.size(self.in_axes) > 1

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.mesh, self.platform, "attention.heads")

    def _gather(self, x: jax.Array, axes: Sequence[Axis], dim: int, point: str) -> jax.Array:
        whole = all_gather(x.astype(self.sent), axes, dim, platform=self.platform, point=point)
        return whole.astype(jnp.float32)

    def _reduce_scatter(self, x: jax.Array, axes: Sequence[Axis], dim: int, point: str) -> jax.Array:
        chunk = reduce_scatter(x.astype(self.sent), axes, dim, platform=self.platform, point=point)
        return chunk.astype(jnp.float32)

    def _sum(self, x: jax.Array, axes: Sequence[Axis], point: str) -> jax.Array:
        return all_reduce(x.astype(self.sent), axes, platform=self.platform, point=point).astype(jnp.float32)

    def _scatter_together(self, parts: list[jax.Array], point: str) -> list[jax.Array]:
        """The sums of each part [T, len] over `in_axes`, its columns scattered over them, in one exchange."""
        k = self.mesh.size(self.in_axes)
        if k == 1:
            return parts
        chunked = jnp.concatenate([part.reshape(part.shape[0], k, -1) for part in parts], axis=2)
        own = self._reduce_scatter(chunked, self.in_axes, 1, point)[:, 0]
        return _split(own, [part.shape[1] // k for part in parts])

    def _gather_together(self, parts: list[jax.Array], point: str) -> list[jax.Array]:
        """The reverse, without sums: each part [T, len] -> [T, len K]."""
        if self.mesh.size(self.in_axes) == 1:
            return parts
        joined = jnp.concatenate(parts, axis=1)[:, None]
        gathered = self._gather(joined, self.in_axes, 1, point)  # [T, K, len of all]
        whole = _split(gathered, [part.shape[1] for part in parts])
        return [part.reshape(part.shape[0], -1) for part in whole]

    def _gathered(
        self, matrix: Matrix, rows_over: Sequence[Axis], columns_over: Sequence[Axis], num_parts: int, block: str
    ) -> Matrix:
        """The matrix without the shards that lie on devices with other rows.

        Args:
            rows_over: axes over which its rows are stored sharded; so the columns.
            num_parts: of equal length, in each of which rows are sharded by themselves: 2 for gate and up.
        """
        rows_over = [axis for axis in rows_over if axis in self.row_axes]
        columns_over = [axis for axis in columns_over if axis in self.row_axes]
        if self.mesh.size((*rows_over, *columns_over)) == 1:
            return matrix
        weight = matrix.weight
        assert isinstance(weight, Weight) and weight.format == "dense"
        data = jnp.asarray(weight.data)[matrix.index]
        parts = data.reshape(num_parts, -1, data.shape[1])
        point = f"{block}.weights"
        parts = all_gather(parts, columns_over, 2, platform=self.platform, point=point)
        parts = all_gather(parts, rows_over, 1, platform=self.platform, point=point)
        data = parts.reshape(1, -1, parts.shape[2])
        return matrix._replace(weight=Weight(data, "dense", data.shape[1:]), index=0)

    def _norm(self, x: jax.Array, norm: Norm, axes: Sequence[Axis]) -> jax.Array:
        """The norm of x [T, D_axes], in float32."""
        dim = x.shape[1] * self.mesh.size(axes)

        def mean(y: jax.Array) -> jax.Array:
            total = jnp.sum(y, axis=1, keepdims=True)
            return all_reduce(total, axes, platform=self.platform, point="norm") / dim

        if norm.kind == "layer":
            x = x - mean(x)
        y = x * jax.lax.rsqrt(mean(jnp.square(x)) + norm.eps) * own_chunk(norm.weight[norm.row][None], axes, 1)
        return y if norm.bias is None else y + own_chunk(norm.bias[norm.row][None], axes, 1)

    def _with_own_bias(self, matrix: Matrix, axes: Sequence[Axis]) -> Matrix:
        """The matrix with the part [1, N_axes] of its bias."""
        if matrix.bias is None:
            return matrix
        return matrix._replace(layer=0, bias=own_chunk(matrix.bias[matrix.layer][None], axes, 1))

    def _counts(self, counts: jax.Array, num_rows: int) -> jax.Array:
        """How many rows to compute of those that this device has: where they are sharded, all."""
        return counts if self.mesh.size(self.row_axes) == 1 else _all_rows(num_rows)


class _Source:
    """The input of a block: x [T_rows, D_in], and its norms."""

    def __init__(self, layout: Partition, x: jax.Array, counts: jax.Array) -> None:
        self._layout, self._x = layout, x
        self._counts = layout._counts(counts, x.shape[0])
        self._normed: dict[int, jax.Array] = {}

    def times(self, norm: Norm | None, matrix: Matrix, own: Sequence[Axis] = (), **fused: Any) -> jax.Array:
        """norm(x) @ matrix.T, for x's own rows over the axes `own`."""
        layout, x, counts = self._layout, self._x, self._counts
        if norm is not None and layout._is_partial:
            if id(norm) not in self._normed:
                self._normed[id(norm)] = layout._norm(x, norm, layout.in_axes)
            x, norm = self._normed[id(norm)], None
        if layout.mesh.size(own) > 1:
            x = own_rows(x, own, layout.row_axes, layout.mesh)
            counts = _all_rows(x.shape[0])
        return multiply(x, matrix, counts, layout.platform, norm=norm, **fused)


def _block(attention: object | None, mlp: object | None) -> str:
    return "mlp" if attention is None else "attention" if mlp is None else "block"


def _split(y: jax.Array, lengths: list[int]) -> list[jax.Array]:
    """Pieces of the last axis."""
    return jnp.split(y, list(accumulate(lengths))[:-1], axis=-1)


def _all_rows(num_rows: int) -> jax.Array:
    return jnp.full(2, num_rows, jnp.int32)
