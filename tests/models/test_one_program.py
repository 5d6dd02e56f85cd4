"""Whatever a network has, a step of it is one native program, bound without XLA, and says what the reference says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from strop.engine.pack import StepShape
from strop.engine.step import CompiledModel
from strop.models.layout import Single
from strop.models.load import load
from strop.models.params import inventory
from strop.models.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, QkNorm, Rope
from strop.ops import native
from strop.ops.attention import new_cache
from strop.ops.bound import BoundProgram
from strop.ops.dispatch import Platform

NUM_ROWS, BLOCK_LEN = 8, 32
RMS = Norm("rms", 1e-5, weight_offset=1.0)
LAYER = Norm("layer", 1e-5, bias=True)


def network(layer: LayerSpec, **options: object) -> ModelSpec:
    options = {"final_norm": LAYER, "tied_embeddings": True, **options}
    return ModelSpec(64, 48, (layer, layer), max_context_len=64, **options)  # type: ignore[arg-type]


def heads(**options: object) -> Attention:
    return Attention(4, 2, 16, 0.25, **({"rope": Rope(10000.0, 16)} | options))  # type: ignore[arg-type]


GELU = Mlp(96, "gelu_tanh", gated=False, bias=True)
GATED = Mlp(96, "gelu_tanh")
NETWORKS = {
    "norms_around_and_caps": network(
        LayerSpec(heads(soft_cap=5.0, window_len=5), GATED, RMS, RMS, RMS, RMS),
        embedding_scale=8.0,
        logit_soft_cap=3.0,
        final_norm=RMS,
    ),
    "norms_after_branches": network(
        LayerSpec(heads(qk_norm=QkNorm(RMS, "all_heads")), GATED, None, None, RMS, RMS, residual_scale=0.5)
    ),
    "norms_of_sums": network(
        LayerSpec(heads(rope=None, qkv_bias=True, out_bias=True), GELU, None, None, LAYER, LAYER, norm_after=True),
        embedding_norm=LAYER,
        num_positions=64,
        num_token_types=2,
    ),
    "parallel_with_one_norm": network(
        LayerSpec(heads(rope=None, alibi_scale=0.25), GELU, LAYER, None, parallel=True), embedding_norm=LAYER
    ),
    "parallel_with_two_norms": network(LayerSpec(heads(), GELU, LAYER, LAYER, parallel=True), head_bias=True),
    "sinks_and_norms_of_heads": network(
        LayerSpec(heads(sinks=True, qk_norm=QkNorm(RMS, "head")), GATED, RMS, RMS), logit_scale=0.5, final_norm=None
    ),
    "experts_with_biases": network(
        LayerSpec(
            heads(sinks=True, window_len=5),
            Mlp(32, "gelu_sigmoid", bias=True),
            RMS,
            RMS,
            experts=Experts(5, 2, normalise=True, router_bias=True, gate_limit=1.0),
        )
    ),
    "experts_between_norms": network(
        LayerSpec(heads(), GATED, None, RMS, RMS, RMS, residual_scale=0.5, experts=Experts(6, 3, normalise=False))
    ),
}


def load_random(spec: ModelSpec, platform: Platform) -> CompiledModel:
    rng = np.random.default_rng(0)
    values = {path: (rng.standard_normal(info.shape) / 4).astype(np.float32) for path, info in inventory(spec).items()}
    checkpoint = SimpleNamespace(path=Path("random"))
    read = values.__getitem__
    reader: Any = SimpleNamespace(inventory=inventory(spec), read=read, outline=read, checkpoint=checkpoint)
    params = load(reader, spec, platform, num_positions=64, source_hash=lambda: f"random-{hash(spec)}")
    return CompiledModel(params, spec, Single(platform, BLOCK_LEN))


def cache_of(spec: ModelSpec, platform: Platform) -> tuple[jax.Array, ...]:
    return (new_cache(platform, spec.num_layers, 3, 2, 16, BLOCK_LEN),)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_step_is_one_program(name: str) -> None:
    if not native.register():
        pytest.skip("the native library is not built")
    spec = NETWORKS[name]
    places = np.arange(NUM_ROWS)
    token_ids = np.random.default_rng(1).integers(0, spec.vocab_size, NUM_ROWS)
    fields = np.stack([token_ids, places, places, 0 * places, places + 1, 0 * places])
    ints = np.concatenate([fields.ravel(), [NUM_ROWS, 1], [NUM_ROWS - 1], [1]]).astype(np.int32)
    shape = StepShape(NUM_ROWS, 1, 1, 1)
    model, reference = load_random(spec, "native"), load_random(spec, "xla")
    found, expected = (
        np.array(each.logits(cache_of(spec, platform), ints, shape)[0])
        for each, platform in ((model, "native"), (reference, "xla"))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    chosen, _ = model.step(cache_of(spec, "native"), ints, None, shape, 0)
    assert chosen.tolist() == [found[-1].argmax()]
    assert [type(call) for call in model._calls.values()][-1] is BoundProgram
