"""Tiny networks of every structure that a layout treats apart, with random parameters, and steps for them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from strop.models import decoder
from strop.models.layout import Layout, Single
from strop.models.load import load
from strop.models.mesh import MeshShape
from strop.models.parameters import Parameters
from strop.models.params import inventory
from strop.models.partition import Partition
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, QkNorm, Rope
from strop.ops.attention import Rows

BLOCK_LEN = 2
STEPS = ((0, 2), (2, 1), (3, 1))
"""First token and number of tokens of a sequence in each step: a prompt, and two more."""
NUM_BLOCKS = 2
"""Of a sequence."""

RMS = Norm("rms", 1e-5)
LAYER = Norm("layer", 1e-5, bias=True)
ROPE = Rope(10000.0, 4)
SWIGLU = Mlp(32, "silu")


def _network(layer: LayerSpec, **options: Any) -> ModelSpec:
    return ModelSpec(
        32, 53, (layer, layer), **({"final_norm": RMS, "tied_embeddings": True, "max_context_len": 8} | options)
    )


def _heads(num_kv_heads: int, **options: Any) -> Attention:
    return Attention(16, num_kv_heads, 4, 0.5, **({"rope": ROPE} | options))


NETWORKS = {
    "multiquery_parallel": _network(LayerSpec(_heads(1), SWIGLU, RMS, None, parallel=True)),
    "grouped_serial": _network(LayerSpec(_heads(4), SWIGLU, RMS, RMS), tied_embeddings=False),
    "grouped_plain_biased": _network(
        LayerSpec(
            _heads(2, rope=None, qkv_bias=True, out_bias=True), Mlp(32, "gelu", gated=False, bias=True), LAYER, LAYER
        ),
        final_norm=LAYER,
        num_positions=8,
        num_token_types=1,
        head_bias=True,
        tied_embeddings=False,
    ),
    "multihead_two_norms": _network(
        LayerSpec(
            _heads(16, qkv_bias=True, qk_norm=QkNorm(RMS, "head")),
            SWIGLU,
            LAYER,
            RMS,
            parallel=True,
            residual_scale=0.5,
        ),
        embedding_norm=LAYER,
    ),
    "multihead_out_norms": _network(
        LayerSpec(_heads(16), replace(SWIGLU, bias=True), RMS, RMS, RMS, RMS), logit_soft_cap=5.0, logit_scale=0.5
    ),
    "multihead_norms_of_sums": _network(
        LayerSpec(_heads(16), Mlp(32, "gelu", gated=False), None, None, LAYER, LAYER, norm_after=True), final_norm=None
    ),
}


def random_parameters(spec: ModelSpec) -> Parameters:
    """Dense, float32."""
    rng = np.random.default_rng(0)
    values = {
        path: (rng.standard_normal(info.shape) / 4 + path.endswith("norm")).astype(np.float32)
        for path, info in inventory(spec).items()
    }
    reader: Any = SimpleNamespace(inventory=inventory(spec), read=values.__getitem__)
    return load(reader, spec, "xla", num_positions=8, source_hash=str)


@dataclass(frozen=True)
class Steps:
    """A batch of sequences: a step of whole prompts, then steps of a token each."""

    num_seqs: int
    num_shards: int = 1
    """Devices with a cache each, the sequences spread over them in order."""

    @property
    def blocks_per_cache(self) -> int:
        """The null block included."""
        return 1 + NUM_BLOCKS * self.num_seqs // self.num_shards

    def rows(self, first: int, count: int) -> Rows:
        """`count` tokens of every sequence, which has `first` before."""
        rng = np.random.default_rng(first)
        seqs = np.repeat(np.arange(self.num_seqs), count)
        places = first + np.tile(np.arange(count), self.num_seqs)
        token_ids = rng.integers(0, 53, len(seqs))
        fields = np.stack([token_ids, places, places, 0 * places, places + 1, seqs])
        in_cache = np.arange(self.num_seqs) % (self.num_seqs // self.num_shards)
        tables = 1 + NUM_BLOCKS * in_cache[:, None] + np.arange(NUM_BLOCKS)
        counts = jnp.full(2, len(seqs), jnp.int32)
        return Rows(jnp.asarray(fields, jnp.int32), jnp.asarray(tables[None], jnp.int32), counts)

    def moved_blocks(self, num_shards: int) -> jax.Array:
        """int32 [num_shards, P]: which of one cache's blocks each of so many caches is to have."""
        own = NUM_BLOCKS * self.num_seqs // num_shards
        blocks = 1 + np.arange(num_shards)[:, None] * own + np.arange(own)
        return jnp.asarray(np.concatenate([np.zeros((num_shards, 1), int), blocks], axis=1), jnp.int32)


def step_of(spec: ModelSpec, layout: Layout) -> Callable[[Parameters, Rows, Any], tuple[jax.Array, Any]]:
    """Logits of every row, picked by id, and the caches."""

    def step(params: Parameters, rows: Rows, caches: Any) -> tuple[jax.Array, Any]:
        hidden, caches = decoder.forward(params, spec, rows, caches, layout)
        row_ids = jnp.arange(rows.fields.shape[1], dtype=jnp.int32)
        return decoder.logits(params, spec, hidden, rows.counts, layout, row_ids), caches

    return step


def on_one_device(spec: ModelSpec, params: Parameters, steps: Steps) -> list[np.ndarray]:
    """Logits of the prompts, and of each of two tokens after them: all rows in one step, without a cache."""
    parts = [steps.rows(first, count).fields for first, count in STEPS]
    fields = jnp.concatenate(parts, axis=1)
    rows = Rows(fields, jnp.zeros((1, 1), jnp.int32), jnp.full(2, fields.shape[1], jnp.int32))
    logits, _ = jax.jit(step_of(spec, Single("xla")))(params, rows, None)
    ends = np.cumsum([part.shape[1] for part in parts])
    return np.split(np.asarray(logits), ends[:-1])


def layout_of(text: str, mesh: MeshShape) -> Partition:
    """Of "ws2d/heads" or "ws2d/heads/looped"."""
    name, attention, *options = text.split("/")
    return Partition(name, mesh, attention, block_len=BLOCK_LEN, looped="looped" in options)  # type: ignore[arg-type]
