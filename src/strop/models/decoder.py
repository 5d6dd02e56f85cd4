"""The network: one loop over the layers' data. It names no family."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, cast

import jax

from strop.models.cache import cache_groups
from strop.models.layout import AttentionIn, Layout, Matrix, MlpIn, multiply
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.spec import Experts, LayerSpec, ModelSpec
from strop.models.spec import Norm as NormSpec
from strop.ops.attention import AttentionOperands, Cache, Rows, attention
from strop.ops.dispatch import in_layer
from strop.ops.experts import experts
from strop.ops.norm import Norm

Caches = TypeVar("Caches", bound=tuple[jax.Array, ...] | None)
"""The cache array of each group (strop.models.cache), or None where there is none: what goes in comes back."""


def forward(
    params: Parameters,
    spec: ModelSpec,
    rows: Rows,
    caches: Caches,
    layout: Layout,
) -> tuple[jax.Array, Caches]:
    """Hidden states float32 [T, D] before the final norm, and the updated caches.

    Args:
        rows: the step's T token rows. `block_tables` is [G, S, P]: a table for each cache group of `spec`.
        caches: an array per cache group, see ops.attention.new_cache; None attends within the rows alone.
        layout: on several devices, this is a part of a shard_map: see strop.models.partition, and for what goes in and
            comes out strop.models.sharding.
    """
    x = layout.embed(
        rows,
        params.weights["embed"],
        params.weights["positions"] if spec.num_positions else None,
        scale=spec.embedding_scale,
        bias=params.vectors["token_type"] if spec.num_token_types else None,
    )
    if spec.embedding_norm is not None:
        x = layout.add_norm(x, _norm(params, spec.embedding_norm, "embedding_norm"), rows.counts)
    groups = cache_groups(spec)
    places_in_cache = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
    updated: list[jax.Array | None] = [None] * len(groups) if caches is None else [*caches]
    for layer, (layer_spec, places) in enumerate(zip(spec.layers, params.layers, strict=True)):
        group, in_cache = places_in_cache[layer]
        seen = rows if caches is None else rows._replace(block_tables=rows.block_tables[group])
        with in_layer(layer):
            x, updated[group] = _Layer(params, layer, layer_spec, places, seen, layout, in_cache)(x, updated[group])
    return x, cast(Caches, None if caches is None else tuple(updated))


def _norm(params: Parameters, spec: NormSpec, role: str, index: int = 0) -> Norm:
    vectors = params.vectors
    return Norm(spec.kind, vectors[role], vectors.get(f"{role}_bias") if spec.bias else None, spec.eps, index)


class _Layer:
    """One layer at work."""

    def __init__(
        self,
        params: Parameters,
        index: int,
        spec: LayerSpec,
        places: LayerPlaces,
        rows: Rows,
        layout: Layout,
        index_in_cache: int,
    ) -> None:
        self._params, self._index, self._spec, self._places = params, index, spec, places
        self._rows, self._layout, self._index_in_cache = rows, layout, index_in_cache

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        spec, counts, layout = self._spec, self._rows.counts, self._layout
        into = self._attention_in()
        joined = self._mlp_in(into.norm) if self._is_joined else None
        qkv, activated = layout.project_in(x, counts, into, joined)
        assert qkv is not None
        attended, cache = self._attend(qkv, cache)
        if activated is not None:
            branches = (attended, self._o), (activated, self._down)
            return layout.project_out(counts, *branches, scale=spec.residual_scale, residual=x), cache
        after = self._add(x, "attention", partial(layout.project_out, counts, (attended, self._o), None))
        return self._add(after, "mlp", partial(self._mlp, x if spec.parallel else after)), cache

    @property
    def _is_joined(self) -> bool:
        """Whether attention and MLP read and write x together."""
        spec = self._spec
        return spec.parallel and spec.experts is None and spec.attention_out_norm is None and spec.mlp_out_norm is None

    def _add(self, x: jax.Array, branch: Literal["attention", "mlp"], project: Callable[..., jax.Array]) -> jax.Array:
        """x and what a branch gives."""
        out_norm = self._norm(f"{branch}_out_norm")
        scale = self._spec.residual_scale
        if out_norm is None:
            return project(scale=scale, residual=x)
        if self._spec.norm_after:
            return self._layout.add_norm(project(scale=scale, residual=x), out_norm, self._rows.counts)
        return self._layout.add_norm(project(), out_norm, self._rows.counts, scale=scale, residual=x)

    def _attend(self, qkv: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        heads, places, vectors = self._spec.attention, self._places, self._params.vectors
        qk_norm = None
        if heads.qk_norm is not None:
            q_norm, k_norm = (
                _norm(self._params, heads.qk_norm.norm, role, self._index) for role in ("q_norm", "k_norm")
            )
            qk_norm = q_norm, k_norm
        operands = AttentionOperands(
            None if places.rope is None else self._params.ropes[places.rope],
            qk_norm,
            (vectors["sinks"], self._index) if heads.sinks else None,
        )
        rows, num_heads, num_kv_heads = self._layout.view_attention(self._rows, heads)
        return attention(
            qkv,
            cache,
            self._index_in_cache,
            rows,
            operands,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=heads.head_dim,
            scale=heads.scale,
            soft_cap=heads.soft_cap,
            alibi_scale=heads.alibi_scale,
            window_len=heads.window_len,
            block_len=self._layout.block_len,
            kv_dtype=self._layout.kv_dtype,
            platform=self._layout.platform,
        )

    def _mlp(self, x: jax.Array, **fused: Any) -> jax.Array:
        """What the MLP makes of its norm of x. `fused`: of project_out."""
        if self._spec.experts is not None:
            return self._experts(self._spec.experts, x, **fused)
        _, activated = self._layout.project_in(x, self._rows.counts, None, self._mlp_in(None))
        assert activated is not None
        return self._layout.project_out(self._rows.counts, None, (activated, self._down), **fused)

    def _attention_in(self) -> AttentionIn:
        places = self._places
        kv = None if places.kv is None else self._matrix(places.kv)
        qkv = self._matrix(places.qkv, "qkv_bias")
        return AttentionIn(self._spec.attention, self._norm("attention_norm"), qkv, kv)

    def _mlp_in(self, shared: Norm | None) -> MlpIn:
        norm = self._norm("mlp_norm")
        if norm is None and self._spec.parallel:
            norm = shared or self._norm("attention_norm")
        return MlpIn(self._spec.mlp, norm, self._matrix(self._places.gate_up, "gate_up_bias"))

    @property
    def _o(self) -> Matrix:
        return self._matrix(self._places.o, "o_bias")

    @property
    def _down(self) -> Matrix:
        return self._matrix(self._places.down, "down_bias")

    def _experts(self, spec: Experts, x: jax.Array, **fused: Any) -> jax.Array:
        params, places, platform = self._params, self._places, self._layout.platform
        assert places.router is not None
        biases = None
        if self._spec.mlp.bias:
            biases = params.vectors["experts_gate_up_bias"], params.vectors["experts_down_bias"]
        norm = self._mlp_in(None).norm
        x = x if norm is None else self._layout.add_norm(x, norm, self._rows.counts)
        return experts(
            x,
            multiply(x, self._matrix(places.router, "router_bias"), self._rows.counts, platform),
            self._rows.counts,
            (params.weights[places.gate_up.stack], places.gate_up.index),
            (params.weights[places.down.stack], places.down.index),
            spec.num_active,
            normalise=spec.normalise,
            activation=self._spec.mlp.activation,
            platform=platform,
            gate_limit=spec.gate_limit,
            layer=self._index,
            biases=biases,
            **fused,
        )

    def _norm(self, role: str) -> Norm | None:
        spec: NormSpec | None = getattr(self._spec, role)
        return None if spec is None else _norm(self._params, spec, role, self._index)

    def _matrix(self, place: Place, bias: str = "") -> Matrix:
        return Matrix(self._params.weights[place.stack], place.index, self._index, self._params.vectors.get(bias))


def final_norm(params: Parameters, spec: ModelSpec, hidden: jax.Array, counts: jax.Array, layout: Layout) -> jax.Array:
    """Hidden states float32 [T, D] after the final norm, where there is one: what `logits` multiplies by the head."""
    if spec.final_norm is None:
        return hidden
    return layout.add_norm(hidden, _norm(params, spec.final_norm, "final_norm"), counts)


def logits(
    params: Parameters,
    spec: ModelSpec,
    hidden: jax.Array,
    counts: jax.Array,
    layout: Layout,
    row_ids: jax.Array | None = None,
) -> jax.Array:
    """float32 [R, V]: final norm and head, for the rows `row_ids` [R] of hidden states [T, D] or for all of them.

    counts[1] rows are computed.
    """
    head = params.weights["embed" if spec.tied_embeddings else "head"]
    return layout.head(
        hidden,
        Matrix(head, 0, bias=params.vectors.get("head_bias")),
        None if spec.final_norm is None else _norm(params, spec.final_norm, "final_norm"),
        counts,
        num_outputs=spec.vocab_size,
        row_ids=row_ids,
        scale=spec.logit_scale,
        soft_cap=spec.logit_soft_cap,
    )
