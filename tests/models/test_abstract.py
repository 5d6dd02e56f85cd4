"""Counting from a spec alone: no checkpoint, no device, one trace per kind of layer, and XLA counts the same."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from strop.core.errors import UnsupportedError
from strop.engine.costs import CostModel
from strop.models import decoder
from strop.models.abstract import abstract_parameters, distinct_layers, parameter_bytes
from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rope
from strop.ops.attention import Rows
from strop.ops.weights import PACKED_FORMATS

NORM = Norm("rms", 1e-6)
WIDE = Attention(8, 2, 32, 0.2, Rope(1e4, 32))
LAYER = LayerSpec(WIDE, Mlp(192, "silu"), NORM, NORM)
WINDOWED = replace(LAYER, attention=replace(WIDE, window_len=16))
MIXED = replace(LAYER, experts=Experts(4, 2, True), mlp=Mlp(64, "silu"))
SPEC = ModelSpec(128, 512, (LAYER, WINDOWED, LAYER, MIXED, WINDOWED, LAYER), NORM, False, 64)


def count_layers(spec: ModelSpec, batch: int, context_len: int, format_of: dict[int, str]) -> list[object]:
    """The costs of a step where no layer stands for another."""
    params = abstract_parameters(spec, lambda path: format_of.get(layer_of(path), "q4"), "native", num_positions=64)
    unlike = tuple(
        replace(layer, attention=replace(layer.attention, scale=0.1 + i)) for i, layer in enumerate(spec.layers)
    )
    costs = [CostModel(params, replace(spec, layers=layers), Single("native")) for layers in (spec.layers, unlike)]
    assert len(costs[0].calls(2, 1)) < len(costs[1].calls(2, 1))
    return [cost.step(batch, batch, [context_len] * batch) for cost in costs]


def layer_of(path: str) -> int:
    return int(path.split(".")[1]) if path.startswith("layers.") else -1


@pytest.mark.parametrize("format_of", [{}, {0: "q8"}, {4: "q5_offset", -1: "q8"}])
def test_a_layer_stands_for_those_like_it(format_of: dict[int, str]) -> None:
    shared, alone = count_layers(SPEC, 3, 40, format_of)
    assert shared == alone


def test_one_layer_of_each_kind() -> None:
    params = abstract_parameters(SPEC, lambda path: "q8" if layer_of(path) == 2 else "q4", "native", num_positions=64)
    some, spec, counts = distinct_layers(params, SPEC)
    assert spec.layers == (LAYER, WINDOWED, LAYER, MIXED)
    assert counts == (2, 2, 1, 1)
    assert [places.qkv for places in some.layers] == [params.layers[i].qkv for i in (0, 1, 2, 3)]
    assert len(cache_groups(spec)) == 2


def test_bytes_are_those_of_the_tiles() -> None:
    spec = replace(SPEC, layers=(LAYER,) * 5)
    params = abstract_parameters(
        spec, lambda path: "q8" if path in ("embed", "head") else "q4", "native", num_positions=8
    )
    rows = {"qkv": (384, 128), "o": (128, 256), "gate_up": (384, 128), "down": (128, 192)}
    layer = sum(n // 16 * PACKED_FORMATS["q4"].tile_bytes(k) for n, k in rows.values())
    tables = 2 * 512 // 16 * PACKED_FORMATS["q8"].tile_bytes(128)
    norms = 4 * 128 * (2 * 5 + 1)
    assert parameter_bytes(params) == 5 * layer + tables + norms


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q: format 'q3'.*q4_offset"):
        abstract_parameters(SPEC, lambda path: "q3", "native", num_positions=8)
    with pytest.raises(UnsupportedError, match=r"'q8' is none of xla's; choose from f32, f16, bf16, int8"):
        abstract_parameters(SPEC, lambda path: "q8", "xla", num_positions=8)


@pytest.mark.parametrize("layer", [LAYER, replace(LAYER, parallel=True), replace(LAYER, mlp=Mlp(192, "gelu", False))])
def test_xla_counts_the_same_products(layer: LayerSpec) -> None:
    """Of rows that see one another: without a cache the reference computes every pair."""
    spec = replace(SPEC, layers=(layer,) * 3, causal=False)
    params = abstract_parameters(spec, lambda path: "f32", "xla", num_positions=64)
    num_rows = 48

    def forward(params, fields, tables, counts):
        rows = Rows(fields, tables, counts)
        hidden, _ = decoder.forward(params, spec, rows, None, Single("xla"))
        return decoder.logits(params, spec, hidden, counts, Single("xla"))

    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((6, num_rows), (1, 1, 1), (2,))]
    params = replace(params, weights=params.weights | {"head": params.weights["embed"]})
    analysis = jax.jit(forward).lower(params, *ints).compile().cost_analysis()
    flops = CostModel(params, spec, Single("xla")).step(num_rows, num_rows, [num_rows], 1).total_flops
    pairs = 4 * 8 * 32 * num_rows * 3
    counted = flops + (num_rows - 1) * pairs  # the step's one new row sees all, as the others do here
    assert counted == pytest.approx(analysis["flops"], rel=0.1)
    assert counted <= analysis["flops"]


_TRACE = """
from dataclasses import replace
import jax._src.xla_bridge as bridge
from strop.engine.costs import CostModel
from strop.models.abstract import abstract_parameters
from strop.models.layout import Single
from strop.models.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rope
norm = Norm("rms", 1e-6)
layer = LayerSpec(Attention(48, 1, 256, 0.0625, Rope(1e4, 256)), Mlp(73728, "silu"), norm, None, parallel=True)
mixed = replace(layer, experts=Experts(8, 2, True), mlp_norm=norm)
for layers in ((layer,) * 118, (mixed,) * 2):
    spec = ModelSpec(18432, 256000, layers, norm, True, 2048)
    for platform, name in (("native", "q4"), ("xla", "bf16")):
        params = abstract_parameters(spec, lambda path: name, platform, num_positions=2048)
        step = CostModel(params, spec, Single(platform)).decode_step(64, 2048)
        if len(layers) == 118:
            assert 1.07e12 < step.total_flops / 64 < 1.10e12, step
assert not bridge.backends_are_initialized()
"""


def test_no_device_is_touched() -> None:
    subprocess.run([sys.executable, "-c", _TRACE], check=True, timeout=120)
