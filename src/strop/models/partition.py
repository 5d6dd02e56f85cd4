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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

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
from strop.ops.collective.looped import all_gather_matmul, matmul_reduce_scatter
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
    looped: bool = False
    """Whether {block}.in and {block}.out go around a ring while their products are computed chunk by chunk."""

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
        wanted: list[_Wanted] = []
        if attention is not None:
            wanted += [self._queries(attention, block), self._kv(attention, block)]
        if mlp is not None:
            wanted.append(self._hidden(mlp, block))
        products = self._products(x, counts, wanted, block)
        heads: list[jax.Array] = []
        kv = None
        if attention is not None:
            heads.append(products.pop(0))
            kv = products.pop(0)
            if self._has_own_kv_heads(attention.spec):
                heads, kv = heads + jnp.split(kv, 2, axis=1), None
        hidden = (
            jnp.split(products.pop(), 1 + mlp.spec.gated, axis=1)
            if mlp is not None and self._is_unfinished
            else products
        )
        scattered = self._scatter_together([*heads, *hidden], f"{block}.hidden")
        qkv = activated = None
        if attention is not None:
            qkv = self._to_attention(attention, scattered[: len(heads)], kv)
        if mlp is not None:
            activated = jnp.concatenate(scattered[len(heads) :], axis=1)
            if self._is_unfinished:
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
        total = self._add_up(products, counts, f"{block}.out")
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
            x = _NormScales(self, x, self.x_axes).apply(norm, x, jax.lax.axis_index(self.x_axes))
            norm = None
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

    def _queries(self, attention: AttentionIn, block: str) -> "_Wanted":
        """Queries [T_rows, N_out H]."""
        placement = PLACEMENTS[self.name]
        matrix = self._gathered(attention.qkv, placement.ffn, placement.embed, 1, block)
        return _Wanted(attention.norm, matrix._replace(bias=None))

    def _kv(self, attention: AttentionIn, block: str) -> "_Wanted":
        """Keys and values [T, 2 K_kv H]. No product is done twice where attention is sharded over the batch: devices with
        the same weights then take different rows."""
        placement = PLACEMENTS[self.name]
        stored = kv_axes(placement, self.mesh, attention.spec.num_kv_heads)
        assert attention.kv is not None, "a partitioned network keeps queries apart: see strop.models.sharding"
        matrix = self._gathered(attention.kv._replace(bias=None), stored, placement.embed, 2, block)
        own = self._spare_axes(attention.spec) if self.attention == "batch" else ()
        return _Wanted(attention.norm, matrix, own)

    def _to_attention(self, attention: AttentionIn, heads: list[jax.Array], kv: jax.Array | None) -> jax.Array:
        """Queries, keys and values [T', (N' + 2 K') H] of the view that attention has."""
        spec = attention.spec
        parts = [part.reshape(part.shape[0], -1, spec.head_dim) for part in heads]
        if self.attention == "heads":
            parts = [self._exchange.join_rows(part, self.row_axes[::-1], ()) for part in parts]
            parts += [] if kv is None else self._shared_kv(spec, kv)
        else:
            assert kv is not None
            parts = [self._exchange.split_rows(part, self.head_axes, self.row_axes) for part in parts]
            parts += self._kv_of_own_rows(spec, kv)
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

    def _spare_axes(self, spec: Attention) -> tuple[Axis, ...]:
        """Axes whose devices have the same rows and the same weights of keys and values."""
        taken = (*self.row_axes, *self.in_axes, *self._kv_axes(spec))
        return tuple(axis for axis in AXES if axis not in taken)

    def _shared_kv(self, spec: Attention, kv: jax.Array) -> list[jax.Array]:
        """Key and value [T, 1, H] of this device's queries, where several devices share a head."""
        kv = self._sum(kv, self.in_axes, "attention.kv")
        kv = self._gather(kv, self.row_axes, 0, "attention.kv")
        kv = kv.reshape(kv.shape[0], 2, -1, spec.head_dim)
        head = jax.lax.axis_index(HEAD_AXES) * spec.num_kv_heads // self.mesh.size()
        axes = self._kv_axes(spec)
        if axes:
            head = head - jax.lax.axis_index(axes) * kv.shape[2]
        own = jax.lax.dynamic_slice_in_dim(kv, head, 1, 2)
        return [own[:, 0], own[:, 1]]

    def _kv_of_own_rows(self, spec: Attention, kv: jax.Array) -> list[jax.Array]:
        """Keys and values [T', K, H] of this device's rows."""
        rows_over = (*self.row_axes, *self._spare_axes(spec))
        kv = self._reduce_scatter(axes_first(kv, self.in_axes, rows_over, self.mesh), self.in_axes, 0, "attention.kv")
        by_head = jnp.moveaxis(kv.reshape(kv.shape[0], 2, -1, spec.head_dim), 1, 2)  # [T, K, 2, H]
        by_head = self._exchange.split_rows(by_head, self._kv_axes(spec), (*rows_over, *self.in_axes))
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

    def _hidden(self, mlp: MlpIn, block: str) -> "_Wanted":
        """Activations [T_rows, F_out]; unfinished, what goes into them."""
        placement, gated = PLACEMENTS[self.name], mlp.spec.gated
        matrix = self._gathered(mlp.gate_up, placement.ffn, placement.embed, 1 + gated, block)
        if self._is_unfinished:
            return _Wanted(mlp.norm, matrix._replace(bias=None))
        matrix = matrix._replace(layer=0, bias=self._hidden_bias(mlp))
        return _Wanted(mlp.norm, matrix, fused={"activation": mlp.spec.activation, "gated": gated})

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
    def _edge_axes(self) -> tuple[Axis, ...]:
        """Axes over which a block gathers its input and scatters its output."""
        return tuple(axis for axis in self.x_axes if axis not in self.in_axes)

    @property
    def _is_looped(self) -> bool:
        return self.looped and self.mesh.size(self._edge_axes) > 1

    @property
    def _is_unfinished(self) -> bool:
        """Whether something is left to add up when a first product is there."""
        return self._is_partial or self._is_looped

    def _products(self, x: jax.Array, counts: jax.Array, wanted: list["_Wanted"], block: str) -> list[jax.Array]:
        """All first products of a block, with one exchange of x [T_rows, D_others]."""
        point, axes = f"{block}.in", self._edge_axes
        counts = self._counts(counts, x.shape[0])
        if self._is_looped:
            scales = _NormScales(self, x, self.x_axes)
            k, sent = self.mesh.size(axes), x.astype(self.sent)

            def multiply(chunk: jax.Array, i: jax.Array) -> list[jax.Array]:
                place = jax.lax.axis_index(self.in_axes) * k + i if self.in_axes else i
                return [
                    self._times(scales.apply(one.norm, chunk.astype(jnp.float32), place), one, counts, i)
                    for one in wanted
                ]

            return all_gather_matmul(sent, axes, multiply, platform=self.platform, point=point)
        x = self._gather(x, axes, 1, point)
        if not self._is_partial:
            return [self._times(x, one, counts, norm=one.norm) for one in wanted]
        scales = _NormScales(self, x, self.in_axes)
        place = jax.lax.axis_index(self.in_axes)
        return [self._times(scales.apply(one.norm, x, place), one, counts) for one in wanted]

    def _times(
        self,
        x: jax.Array,
        wanted: "_Wanted",
        counts: jax.Array,
        chunk: jax.Array | None = None,
        norm: Norm | None = None,
    ) -> jax.Array:
        """x [T_rows, len] times a matrix, or times the chunk of its columns that is so long; for the own rows wanted."""
        if self.mesh.size(wanted.own) > 1:
            x = own_rows(x, wanted.own, self.row_axes, self.mesh)
            counts = _all_rows(x.shape[0])
        matrix = wanted.matrix if chunk is None else _chunk(wanted.matrix, chunk, x.shape[1], 1)
        return multiply(x, matrix, counts, self.platform, norm=norm, **wanted.fused)

    def _add_up(self, products: list[tuple[jax.Array, Matrix]], counts: jax.Array, point: str) -> jax.Array:
        """This device's columns of the sum of all second products: [T_rows, D_others]."""
        axes = self._edge_axes
        if not self._is_looped:
            return self._reduce_scatter(add_products(products, counts, self.platform), axes, 1, point)
        num_rows, dim = products[0][0].shape[0], products[0][1].weight.shape[0]
        length = dim // self.mesh.size(axes)

        def multiply(i: jax.Array) -> jax.Array:
            chunks = [(y, _chunk(matrix, i, length, 0)) for y, matrix in products]
            return add_products(chunks, counts, self.platform)

        return matmul_reduce_scatter(multiply, (num_rows, dim), self.sent, axes, platform=self.platform, point=point)

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.mesh, self.platform, "attention.heads", self.sent)

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

    def _with_own_bias(self, matrix: Matrix, axes: Sequence[Axis]) -> Matrix:
        """The matrix with the part [1, N_axes] of its bias."""
        if matrix.bias is None:
            return matrix
        return matrix._replace(layer=0, bias=own_chunk(matrix.bias[matrix.layer][None], axes, 1))

    def _counts(self, counts: jax.Array, num_rows: int) -> jax.Array:
        """How many rows to compute of those that this device has: where they are sharded, all."""
        return counts if self.mesh.size(self.row_axes) == 1 else _all_rows(num_rows)


class _Wanted(NamedTuple):
    """A first product: norm(x) @ matrix.T."""

    norm: Norm | None
    matrix: Matrix
    own: Sequence[Axis] = ()
    """Axes over which only this device's rows are wanted."""
    fused: Mapping[str, Any] = MappingProxyType({})
    """What `linear` is to do with it."""


class _NormScales:
    """Norms of rows that are spread over devices, in float32: what is known of whole rows x [T, D_axes]."""

    def __init__(self, layout: Partition, x: jax.Array, axes: Sequence[Axis]) -> None:
        self._layout, self._x, self._axes = layout, x, axes
        self._found: dict[tuple[str, float], tuple[jax.Array | None, jax.Array]] = {}

    def apply(self, norm: Norm | None, x: jax.Array, place: jax.Array) -> jax.Array:
        """The norm of columns x [T, len], the `place`-th that are so long."""
        if norm is None:
            return x
        mean, scale = self._of_rows(norm)
        weight, bias = (
            None if vectors is None else _slice(vectors[norm.row][None], place, x.shape[1], 1)
            for vectors in (norm.weight, norm.bias)
        )
        y = (x if mean is None else x - mean) * scale * weight
        return y if bias is None else y + bias

    def _of_rows(self, norm: Norm) -> tuple[jax.Array | None, jax.Array]:
        """Mean, if it is subtracted, and factor [T, 1] of each row."""
        found = self._found.get((norm.kind, norm.eps))
        if found is None:
            mean = self._mean(self._x) if norm.kind == "layer" else None
            centred = self._x if mean is None else self._x - mean
            found = mean, jax.lax.rsqrt(self._mean(jnp.square(centred)) + norm.eps)
            self._found[norm.kind, norm.eps] = found
        return found

    def _mean(self, y: jax.Array) -> jax.Array:
        total = jnp.sum(y, axis=1, keepdims=True)
        layout, dim = self._layout, y.shape[1] * self._layout.mesh.size(self._axes)
        return all_reduce(total, self._axes, platform=layout.platform, point="norm") / dim


def _chunk(matrix: Matrix, i: jax.Array, length: int, dim: int) -> Matrix:
    """The i-th so many rows (`dim` 0) or columns of a matrix."""
    weight = matrix.weight
    assert isinstance(weight, Weight) and weight.format == "dense"
    data = _slice(jnp.asarray(weight.data)[matrix.index], i, length, dim)[None]
    return matrix._replace(weight=Weight(data, "dense", data.shape[1:]), index=0)


def _slice(x: jax.Array, i: jax.Array, length: int, dim: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * length, length, dim)


def _block(attention: object | None, mlp: object | None) -> str:
    return "mlp" if attention is None else "attention" if mlp is None else "block"


def _split(y: jax.Array, lengths: list[int]) -> list[jax.Array]:
    """Pieces of the last axis."""
    return jnp.split(y, list(accumulate(lengths))[:-1], axis=-1)


def _all_rows(num_rows: int) -> jax.Array:
    return jnp.full(2, num_rows, jnp.int32)
