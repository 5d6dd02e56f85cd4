"""The network: one loop over the layers' data. It names no family."""

from typing import Any, Literal, TypeVar, cast

import jax

from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.parameters import LayerPlaces, Parameters, Place
from strop.models.spec import Experts, LayerSpec, ModelSpec
from strop.models.spec import Norm as NormSpec
from strop.ops.attention import AttentionOperands, Cache, Rows, attention
from strop.ops.dispatch import in_layer
from strop.ops.embed import embed
from strop.ops.experts import experts
from strop.ops.linear import linear
from strop.ops.norm import Norm, add_norm

Caches = TypeVar("Caches", bound=tuple[jax.Array, ...] | None)
"""The cache array of each group (strop.models.cache), or None where there is none: what goes in comes back."""


def forward(
    params: Parameters,
    spec: ModelSpec,
    rows: Rows,
    caches: Caches,
    layout: Single,
) -> tuple[jax.Array, Caches]:
    """Hidden states float32 [T, D] before the final norm, and the updated caches.

    Args:
        rows: the step's T token rows. `block_tables` is [G, S, P]: a table for each cache group of `spec`.
        caches: an array per cache group, see ops.attention.new_cache; None attends within the rows alone.
    """
    counts, platform, vectors = rows.counts, layout.platform, params.vectors
    x = embed(
        rows.fields[0],
        params.weights["embed"],
        counts,
        platform=platform,
        scale=spec.embedding_scale,
        bias=vectors["token_type"] if spec.num_token_types else None,
    )
    if spec.num_positions:
        x = embed(rows.fields[1], params.weights["positions"], counts, platform=platform, residual=x)
    if spec.embedding_norm is not None:
        x = add_norm(x, _norm(params, spec.embedding_norm, "embedding_norm"), counts, platform=platform)
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
        layout: Single,
        index_in_cache: int,
    ) -> None:
        self._params, self._index, self._spec, self._places = params, index, spec, places
        self._rows, self._layout, self._index_in_cache = rows, layout, index_in_cache

    def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        spec = self._spec
        attended, cache = self._attend(x, cache)
        if spec.parallel:
            mlp_norm = self._norm("mlp_norm" if spec.mlp_norm is not None else "attention_norm")
            after = self._add(x, "attention", attended)
            return self._add(after, "mlp", x, mlp_norm), cache
        x = self._add(x, "attention", attended)
        return self._add(x, "mlp", x, self._norm("mlp_norm")), cache

    def _add(
        self, x: jax.Array, branch: Literal["attention", "mlp"], given: jax.Array, norm: Norm | None = None
    ) -> jax.Array:
        """x and what a branch makes of `given`."""
        out_norm = self._norm(f"{branch}_out_norm")
        scale = self._spec.residual_scale
        project = self._project if branch == "attention" else self._mlp
        if out_norm is None:
            return project(given, norm, scale=scale, residual=x)
        if self._spec.norm_after:
            return self._add_norm(project(given, norm, scale=scale, residual=x), out_norm)
        return self._add_norm(project(given, norm), out_norm, scale=scale, residual=x)

    def _add_norm(self, x: jax.Array, norm: Norm | None, **fused: Any) -> jax.Array:
        return add_norm(x, norm, self._rows.counts, platform=self._layout.platform, **fused)

    def _attend(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
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
        return attention(
            self._matrix(places.qkv, x, norm=self._norm("attention_norm"), bias=vectors.get("qkv_bias")),
            cache,
            self._index_in_cache,
            self._rows,
            operands,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            scale=heads.scale,
            soft_cap=heads.soft_cap,
            alibi_scale=heads.alibi_scale,
            window_len=heads.window_len,
            block_len=self._layout.block_len,
            kv_dtype=self._layout.kv_dtype,
            platform=self._layout.platform,
        )

    def _project(self, attended: jax.Array, _: Norm | None, **fused: Any) -> jax.Array:
        return self._matrix(self._places.o, attended, bias=self._params.vectors.get("o_bias"), **fused)

    def _mlp(self, x: jax.Array, norm: Norm | None, **fused: Any) -> jax.Array:
        mlp, places, vectors = self._spec.mlp, self._places, self._params.vectors
        if self._spec.experts is not None:
            return self._experts(self._spec.experts, x, norm, **fused)
        activated = self._matrix(
            places.gate_up,
            x,
            norm=norm,
            bias=vectors.get("gate_up_bias"),
            activation=mlp.activation,
            gated=mlp.gated,
        )
        return self._matrix(places.down, activated, bias=vectors.get("down_bias"), **fused)

    def _experts(self, spec: Experts, x: jax.Array, norm: Norm | None, **fused: Any) -> jax.Array:
        params, places = self._params, self._places
        assert places.router is not None
        biases = None
        if self._spec.mlp.bias:
            biases = params.vectors["experts_gate_up_bias"], params.vectors["experts_down_bias"]
        x = x if norm is None else self._add_norm(x, norm)
        return experts(
            x,
            self._matrix(places.router, x, bias=params.vectors.get("router_bias")),
            self._rows.counts,
            (params.weights[places.gate_up.stack], places.gate_up.index),
            (params.weights[places.down.stack], places.down.index),
            spec.num_active,
            normalise=spec.normalise,
            activation=self._spec.mlp.activation,
            platform=self._layout.platform,
            gate_limit=spec.gate_limit,
            layer=self._index,
            biases=biases,
            **fused,
        )

    def _norm(self, role: str) -> Norm | None:
        spec: NormSpec | None = getattr(self._spec, role)
        return None if spec is None else _norm(self._params, spec, role, self._index)

    def _matrix(self, place: Place, y: jax.Array, **fused: Any) -> jax.Array:
        stack = self._params.weights[place.stack]
        return linear(
            y, stack, place.index, self._rows.counts, platform=self._layout.platform, layer=self._index, **fused
        )


def final_norm(params: Parameters, spec: ModelSpec, hidden: jax.Array, counts: jax.Array, layout: Single) -> jax.Array:
    """Hidden states float32 [T, D] after the final norm, where there is one: what `logits` multiplies by the head."""
    if spec.final_norm is None:
        return hidden
    return add_norm(hidden, _norm(params, spec.final_norm, "final_norm"), counts, platform=layout.platform)


def logits(
    params: Parameters,
    spec: ModelSpec,
    hidden: jax.Array,
    counts: jax.Array,
    layout: Single,
    row_ids: jax.Array | None = None,
) -> jax.Array:
    """float32 [R, V]: final norm and head, for the rows `row_ids` [R] of hidden states [T, D] or for all of them.

    counts[1] rows are computed.
    """
    head = params.weights["embed" if spec.tied_embeddings else "head"]
    return linear(
        hidden,
        head,
        0,
        counts,
        platform=layout.platform,
        norm=None if spec.final_norm is None else _norm(params, spec.final_norm, "final_norm"),
        bias=params.vectors.get("head_bias"),
        scale=spec.logit_scale,
        soft_cap=spec.logit_soft_cap,
        count_index=1,
        row_ids=row_ids,
    )
