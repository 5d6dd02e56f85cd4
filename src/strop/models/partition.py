"""The partition layouts of Pope et al. 2022: the points of a network at which the devices of a mesh exchange something.

The code runs on each device, inside a shard_map over the axes x, y and z. Between two points a device multiplies what
it has by its part of the weights. Over which axes (strop.models.mesh.Placement) what goes where:

    {block}.in        edge             x [T, D_stream] is gathered: [T, D_partial_in]
    {block}.weights   rows             weights are gathered
    {block}.hidden    partial_in       first products are added up and scattered; before the second, gathered again
    {block}.out       edge             second products are added up and scattered: [T, D_stream]
    attention.heads, attention.kv      what brings queries, keys, values and results to where they are wanted
    norm              stream or partial_in    a number or two per row are added up
    embed, head                        once a step

A block is `attention`, `mlp`, or `block`: a parallel block exchanges for both together, half as often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from strop.core.config import KvDtype
from strop.models.attention_sharding import AttentionMoves, bring_back
from strop.models.exchange import Exchange, Sent, own_rows
from strop.models.layout import AttentionIn, AttentionView, Matrix, MlpIn, add_products, multiply
from strop.models.mesh import (
    AXES,
    PLACEMENTS,
    AttentionSharding,
    Axis,
    LayoutName,
    MeshShape,
    Placement,
    check_rows,
)
from strop.models.packed_sharding import join_columns
from strop.models.spec import Attention
from strop.models.spread_norm import SpreadNorm
from strop.ops.attention import Rows
from strop.ops.collective import all_gather, own_chunk
from strop.ops.collective.looped import all_gather_matmul, matmul_reduce_scatter
from strop.ops.dispatch import Platform
from strop.ops.embed import embed
from strop.ops.linear.reference import activate
from strop.ops.norm import Norm, add_norm
from strop.ops.weights import TILE_COLUMNS, AnyWeight, Weight, join_parts


@dataclass(frozen=True, slots=True)
class Partition:
    """A network on a mesh of devices: x is float32 [T_rows, D_stream]."""

    name: LayoutName
    mesh: MeshShape
    attention: AttentionSharding = "heads"
    """heads: a device attends with its heads, in all rows; where there are fewer key/value heads than devices, several
    keep the same one. batch: with all heads, in its rows, which are those of its sequences; each device numbers the
    blocks of its cache for itself."""
    platform: Platform = "xla"
    block_len: int = 32
    kv_dtype: KvDtype = "bf16"
    sent: Sent = "float32"
    """As what activations travel; bfloat16 rounds partial sums, too."""
    looped: bool = False
    """Whether {block}.in and {block}.out go around a ring while their products are computed chunk by chunk."""

    @property
    def placement(self) -> Placement:
        """What is sharded over which axes."""
        return PLACEMENTS[self.name]

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.mesh, self.platform, self.sent)

    def _moves(self, spec: Attention) -> AttentionMoves:
        return AttentionMoves(self.attention, self.placement, self._exchange, spec)

    def embed(
        self, rows: Rows, table: AnyWeight, positions: AnyWeight | None, *, scale: float, bias: jax.Array | None
    ) -> jax.Array:
        """See Layout. A device looks up what lies in its part of the vocabulary."""
        placement = self.placement
        check_rows(rows.fields.shape[1], AXES if self.attention == "batch" else placement.rows, self.mesh)
        fields = rows.fields if placement.vocabulary else own_chunk(rows.fields, placement.rows, 1)

        def look_up(ids: jax.Array, table: AnyWeight, scale: float) -> jax.Array:
            own, is_here = _own_ids(ids, placement.vocabulary, table.shape[0])
            found = embed(own, table, _all_rows(len(ids)), platform=self.platform, scale=scale)
            return jnp.where(is_here[:, None], found, 0.0)

        x = look_up(fields[0], table, scale)
        if positions is not None:
            x = x + look_up(fields[1], positions, 1.0)
        if placement.vocabulary:
            x = self._exchange.reduce_scatter(x, placement.rows, 0, "embed")
            x = self._exchange.reduce_scatter(x, placement.stream, 1, "embed")
        return x if bias is None else x + own_chunk(bias, placement.stream, 1)

    def project_in(
        self, x: jax.Array, counts: jax.Array, attention: AttentionIn | None, mlp: MlpIn | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """See Layout."""
        block = _block(attention, mlp)
        wanted = [] if attention is None else self._attention_products(attention, x, block)
        wanted += [] if mlp is None else [self._mlp_product(mlp, x, block)]
        products = self._products(x, counts, wanted, block)

        heads: list[jax.Array] = []
        hidden: list[jax.Array] = []
        kv = None
        if attention is not None:
            queries, kv, *products = products
            heads = [queries]
            if self._moves(attention.spec).has_own_kv_heads:
                heads, kv = heads + jnp.split(kv, 2, axis=1), None
        if mlp is not None:
            is_in_parts = self._is_unfinished and mlp.spec.gated
            hidden = _gate_and_up(products[0], mlp.gate_up) if is_in_parts else products
        scattered = self._exchange.scatter_together([*heads, *hidden], self.placement.partial_in, f"{block}.hidden")

        qkv = activated = None
        if attention is not None:
            qkv = self._moves(attention.spec).bring(scattered[: len(heads)], kv, attention.qkv)
        if mlp is not None:
            activated = jnp.concatenate(scattered[len(heads) :], axis=1)
            if self._is_unfinished:
                bias = self._hidden_bias(mlp)
                activated = activated if bias is None else activated + bias
                activated = activate(activated, mlp.spec.activation, mlp.spec.gated)
        return qkv, activated

    def view_attention(self, rows: Rows, spec: Attention) -> AttentionView:
        """See Layout."""
        return self._moves(spec).view(rows)

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
        block, placement = _block(attended, activated), self.placement
        if attended is not None:
            attended = bring_back(attended[0], self.attention, placement, self._exchange), attended[1]
        given = [product for product in (attended, activated) if product is not None]
        parts = [y for y, _ in given]
        whole = self._exchange.gather_together(parts, placement.partial_in, f"{block}.hidden")
        matrices = [self._gathered(matrix, whole[0], placement.embed, placement.ffn, 1, block) for _, matrix in given]
        matrices = [_with_own_bias(matrix, placement.stream) for matrix in matrices]
        counts = self._counts(counts, whole[0].shape[0])
        if self.mesh.size(placement.partial_out) == 1:
            products = list(zip(whole, matrices, strict=True))
            return add_products(products, counts, self.platform, scale=scale, residual=residual)
        products = [(y, matrix._replace(bias=None)) for y, matrix in zip(whole, matrices, strict=True)]
        total = self._add_up(products, counts, f"{block}.out")
        for matrix in matrices:
            total = total if matrix.bias is None else total + matrix.bias
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
        axes = self.placement.stream
        if norm is not None and self.mesh.size(axes) > 1:
            x, norm = self._spread_norm(x, axes)(norm, x, jax.lax.axis_index(axes)), None
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
        placement = self.placement
        if row_ids is None:
            x = self._exchange.gather(x, placement.rows, 0, "head")
        else:
            own, is_here = _own_ids(row_ids, placement.rows, x.shape[0])
            x = jnp.where(is_here[:, None], x[own], 0.0)
            x = self._exchange.sum(x, placement.rows, "head")
        x = self._exchange.gather(x, placement.stream, 1, "head")
        if matrix.bias is not None:
            padding = matrix.weight.shape[0] * self.mesh.size(placement.vocabulary) - matrix.bias.shape[1]
            matrix = matrix._replace(bias=jnp.pad(matrix.bias, ((0, 0), (0, padding))))
        matrix = _with_own_bias(matrix, placement.vocabulary)
        logits = multiply(
            x, matrix, counts, self.platform, norm=norm, scale=scale, soft_cap=soft_cap, count_index=1
        )  # fmt: skip
        logits = all_gather(logits, placement.vocabulary, 1, platform=self.platform, point="head")
        return logits[:, :num_outputs]

    # First products

    def _attention_products(self, attention: AttentionIn, x: jax.Array, block: str) -> list["_Wanted"]:
        """Queries [T_rows, N_partial_out H]; keys and values [T_own, 2 K_kv H]."""
        assert attention.kv is not None, "a partitioned network keeps queries apart: see strop.models.sharding"
        placement, moves = self.placement, self._moves(attention.spec)
        q, kv = attention.qkv._replace(bias=None), attention.kv._replace(bias=None)
        return [
            _Wanted(attention.norm, self._gathered(q, x, placement.ffn, placement.embed, 1, block)),
            _Wanted(
                attention.norm, self._gathered(kv, x, moves.stored_kv_axes, placement.embed, 2, block), moves.spare_axes
            ),
        ]

    def _mlp_product(self, mlp: MlpIn, x: jax.Array, block: str) -> "_Wanted":
        """Activations [T_rows, F_partial_out]; unfinished, what goes into them."""
        placement, gated = self.placement, mlp.spec.gated
        matrix = self._gathered(mlp.gate_up, x, placement.ffn, placement.embed, 1 + gated, block)
        if self._is_unfinished:
            return _Wanted(mlp.norm, matrix._replace(bias=None))
        matrix = matrix._replace(layer=0, bias=self._hidden_bias(mlp))
        return _Wanted(mlp.norm, matrix, fused={"activation": mlp.spec.activation, "gated": gated})

    def _hidden_bias(self, mlp: MlpIn) -> jax.Array | None:
        """[1, F_heads], or that of gate and up."""
        weight, _, layer, bias = mlp.gate_up
        if bias is None:
            return None
        if weight.format == "dense":
            return own_chunk(bias[layer].reshape(1 + mlp.spec.gated, -1), self.placement.heads, 1).reshape(1, -1)
        own = own_chunk(bias[layer][None], self.placement.heads, 1)  # in the order of the tiles
        is_in_parts = self._is_unfinished and mlp.spec.gated
        return jnp.concatenate(_gate_and_up(own, mlp.gate_up), axis=1) if is_in_parts else own

    @property
    def _is_partial(self) -> bool:
        """Whether a first product leaves sums to add up."""
        return self.mesh.size(self.placement.partial_in) > 1

    @property
    def _is_looped(self) -> bool:
        return self.looped and self.mesh.size(self.placement.edge) > 1

    @property
    def _is_unfinished(self) -> bool:
        """Whether something is left to add to a first product."""
        return self._is_partial or self._is_looped

    def _products(self, x: jax.Array, counts: jax.Array, wanted: list["_Wanted"], block: str) -> list[jax.Array]:
        """All first products of a block, with one exchange of x [T_rows, D_stream]."""
        placement, point = self.placement, f"{block}.in"
        counts = self._counts(counts, x.shape[0])
        if not self._is_looped:
            x = self._exchange.gather(x, placement.edge, 1, point)
            if not self._is_partial:
                return [self._times(x, one, counts, norm=one.norm) for one in wanted]
            normed, place = self._spread_norm(x, placement.partial_in), jax.lax.axis_index(placement.partial_in)
            return [self._times(normed(one.norm, x, place), one, counts) for one in wanted]

        normed = self._spread_norm(x, placement.stream)
        first: jax.Array | int = 0
        if placement.partial_in:
            first = jax.lax.axis_index(placement.partial_in) * self.mesh.size(placement.edge)

        def multiply_chunk(chunk: jax.Array, i: jax.Array) -> list[jax.Array]:
            chunk = chunk.astype(jnp.float32)
            return [self._times(normed(one.norm, chunk, first + i), one, counts, i) for one in wanted]

        sent = x.astype(self.sent)
        return all_gather_matmul(sent, placement.edge, multiply_chunk, platform=self.platform, point=point)

    def _times(
        self,
        x: jax.Array,
        wanted: "_Wanted",
        counts: jax.Array,
        chunk: jax.Array | None = None,
        *,
        norm: Norm | None = None,
    ) -> jax.Array:
        """norm(x) [T_rows, len] times a matrix, or times that chunk of its columns; for the rows wanted."""
        if self.mesh.size(wanted.own) > 1:
            x = own_rows(x, wanted.own, self.placement.rows, self.mesh)
            counts = _all_rows(x.shape[0])
        matrix = wanted.matrix if chunk is None else _chunk(wanted.matrix, chunk, x.shape[1], 1)
        return multiply(x, matrix, counts, self.platform, norm=norm, **wanted.fused)

    # Second products

    def _add_up(self, products: list[tuple[jax.Array, Matrix]], counts: jax.Array, point: str) -> jax.Array:
        """This device's columns of the sum of all second products: [T_rows, D_stream]."""
        axes = self.placement.edge
        if not self._is_looped:
            return self._exchange.reduce_scatter(add_products(products, counts, self.platform), axes, 1, point)
        num_rows, dim = products[0][0].shape[0], products[0][1].weight.shape[0]
        length = dim // self.mesh.size(axes)

        def multiply_chunk(i: jax.Array) -> jax.Array:
            chunks = [(y, _chunk(matrix, i, length, 0)) for y, matrix in products]
            return add_products(chunks, counts, self.platform)

        shape = num_rows, dim
        return matmul_reduce_scatter(multiply_chunk, shape, self.sent, axes, platform=self.platform, point=point)

    # Weights, norms and counts

    def _gathered(
        self,
        matrix: Matrix,
        x: jax.Array,
        rows_over: Sequence[Axis],
        columns_over: Sequence[Axis],
        num_parts: int,
        block: str,
    ) -> Matrix:
        """The matrix with the shards that lie on devices of other rows.

        Args:
            x: what it is to be multiplied with.
            rows_over: axes over which its rows are stored sharded; so the columns.
            num_parts: of equal length, in each of which rows are sharded by themselves: 2 for gate and up.
        """
        rows_over = [axis for axis in rows_over if axis in self.placement.rows]
        columns_over = [axis for axis in columns_over if axis in self.placement.rows]
        if self.mesh.size((*rows_over, *columns_over)) == 1:
            return matrix
        weight, point = matrix.weight, f"{block}.weights"
        if weight.format != "dense":
            at = _when_known(x, matrix.at)
            gathered = [self._gathered_tiles(part, at, rows_over, columns_over, point) for part in weight.parts]
            return matrix._replace(weight=join_parts(gathered), at=0)
        assert isinstance(weight, Weight)
        data = jnp.asarray(weight.data)[matrix.at]
        parts = data.reshape(num_parts, -1, data.shape[1])
        parts = all_gather(parts, columns_over, 2, platform=self.platform, point=point)
        parts = all_gather(parts, rows_over, 1, platform=self.platform, point=point)
        data = parts.reshape(1, -1, parts.shape[2])
        return matrix._replace(weight=Weight(data, "dense", (data.shape[1], data.shape[2])), at=0)

    def _gathered_tiles(
        self, weight: Weight, at: jax.Array, rows_over: Sequence[Axis], columns_over: Sequence[Axis], point: str
    ) -> Weight:
        """The same of a packed matrix, sent packed. Tiles of parts of the columns become tiles of them all."""
        tiles = jnp.asarray(weight.data)[at].reshape(weight.num_tiles, -1)
        num_rows, k_len = weight.shape
        if (num_shards := self.mesh.size(columns_over)) > 1:
            by_shard = all_gather(tiles[None], columns_over, 0, platform=self.platform, point=point)
            tiles = join_columns(by_shard, weight.format, k_len)
        tiles = all_gather(tiles, rows_over, 0, platform=self.platform, point=point)
        return Weight(tiles.reshape(1, -1), weight.format, (num_rows * self.mesh.size(rows_over), k_len * num_shards))

    def _spread_norm(self, x: jax.Array, axes: Sequence[Axis]) -> SpreadNorm:
        return SpreadNorm(x, axes, self.mesh, self.platform)

    def _counts(self, counts: jax.Array, num_rows: int) -> jax.Array:
        """How many rows to compute of those that this device has: where they are sharded, all."""
        return counts if self.mesh.size(self.placement.rows) == 1 else _all_rows(num_rows)


class _Wanted(NamedTuple):
    """A first product: norm(x) @ matrix.T."""

    norm: Norm | None
    matrix: Matrix
    own: Sequence[Axis] = ()
    """Axes over which only this device's rows are wanted."""
    fused: Mapping[str, Any] = MappingProxyType({})
    """What `linear` is to do with it."""


def _gate_and_up(y: jax.Array, matrix: Matrix) -> list[jax.Array]:
    """The two parts of a product [T, 2 F] with a gated MLP's first matrix; tiles of packed ones alternate."""
    if matrix.weight.format == "dense":
        return jnp.split(y, 2, axis=1)
    tiles = y.reshape(y.shape[0], -1, 2, TILE_COLUMNS)
    return [tiles[:, :, i].reshape(y.shape[0], -1) for i in range(2)]


def _block(attention: object | None, mlp: object | None) -> str:
    return "mlp" if attention is None else "attention" if mlp is None else "block"


def _own_ids(ids: jax.Array, axes: Sequence[Axis], length: int) -> tuple[jax.Array, jax.Array]:
    """Each id within this device's `length` of what is numbered over `axes`, and whether it is there; else 0."""
    first = jax.lax.axis_index(tuple(axes)).astype(ids.dtype) * length if axes else 0
    is_here = (ids >= first) & (ids < first + length)
    return jnp.where(is_here, ids - first, 0), is_here


def _with_own_bias(matrix: Matrix, axes: Sequence[Axis]) -> Matrix:
    """The matrix with its bias [1, N_axes]."""
    if matrix.bias is None:
        return matrix
    return matrix._replace(layer=0, bias=own_chunk(matrix.bias[matrix.layer][None], axes, 1))


def _chunk(matrix: Matrix, i: jax.Array, length: int, dim: int) -> Matrix:
    """The i-th so many rows (`dim` 0) or columns of a matrix."""
    weight = matrix.weight
    assert isinstance(weight, Weight) and weight.format == "dense"
    data = jax.lax.dynamic_slice_in_dim(jnp.asarray(weight.data)[matrix.at], i * length, length, dim)[None]
    return matrix._replace(weight=Weight(data, "dense", (data.shape[1], data.shape[2])), at=0)


def _when_known(x: jax.Array, index: int) -> jax.Array:
    """`index`, but only when x is there: XLA would gather the weights of all layers, which depend on nothing else,
    before it uses any."""
    bits = jax.lax.bitcast_convert_type(x.reshape(-1)[0], jnp.int32)
    return index + jnp.minimum(bits & 0x7FFFFFFF, 0)  # which is 0, as XLA does not see


def _all_rows(num_rows: int) -> jax.Array:
    return jnp.full(2, num_rows, jnp.int32)
