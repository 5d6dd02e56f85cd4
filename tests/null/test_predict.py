"""Steps are sums of operations at a machine's figures: sums done by hand, and what must hold whatever the figures."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from made_up_profile import profile

from strop.core.config import EngineConfig
from strop.engine.costs import CostModel
from strop.models.abstract import abstract_parameters
from strop.models.layout import Single
from strop.models.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rope
from strop.ops.attention import AttentionCall
from strop.plan.predict import Predictor, Span

NORM = Norm("rms", 1e-6)
LAYER = LayerSpec(Attention(16, 4, 64, 0.125, Rope(1e4, 64)), Mlp(4096, "silu"), NORM, NORM)
SPEC = ModelSpec(1024, 32_768, (LAYER,) * 8, NORM, True, 8192)
LAYER_WEIGHTS = 1024 * (1536 + 1024 + 3 * 4096)
HEAD_WEIGHTS = 32_768 * 1024


def predictor(spec: ModelSpec = SPEC, format_name: str = "q4", **changes: Any) -> Predictor:
    params = abstract_parameters(spec, lambda path: format_name, "native", num_positions=8192)
    return Predictor(profile(**changes), CostModel(params, spec, Single("native")))


def test_a_token_reads_every_weight() -> None:
    predicted = predictor().decode(1, 32)
    weights_s = 1e-9 * (8 * LAYER_WEIGHTS + HEAD_WEIGHTS)
    pages_s = 8 * 4 * 1e-6  # per layer and kv head one page of 4 query rows, cold
    assert predicted.binding["weights"] == pytest.approx(weights_s, rel=1e-6)
    assert predicted.seconds == pytest.approx(weights_s + pages_s + 100e-6, rel=0.01)
    assert predicted.binds == "weights"
    assert sum(op.seconds for op in predicted.ops) == pytest.approx(predicted.seconds)


def test_many_rows_compute() -> None:
    predicted = predictor().step([Span(0, 512)], 1)
    assert predicted.binds == "compute"
    products_s = 512 * 0.125e-9 * 8 * LAYER_WEIGHTS
    assert predicted.seconds == pytest.approx(products_s + 1e-9 * HEAD_WEIGHTS, rel=0.1)
    without_token = predictor().step([Span(0, 512)], 0)
    assert predicted.seconds - without_token.seconds == pytest.approx(1e-9 * HEAD_WEIGHTS, rel=0.01)


def test_beyond_the_last_point_products_grow_in_proportion() -> None:
    times = [predictor().step([Span(0, count)], 0).binding["compute"] for count in (512, 1024, 2048)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.1)
    assert times[2] == pytest.approx(2 * times[1], rel=0.1)


def test_a_prompt_is_its_chunks() -> None:
    found = predictor()
    chunks = [found.step([Span(0, 512)], 0), found.step([Span(512, 512)], 0), found.step([Span(1024, 76)], 1)]
    predicted = found.prefill(1100, EngineConfig(max_step_tokens=512))
    assert predicted.seconds == pytest.approx(sum(step.seconds for step in chunks))
    assert predicted.binds == "compute"


def test_long_contexts_read_the_cache() -> None:
    found = predictor()
    steps = [found.decode(32, context_len) for context_len in (1024, 2048, 4096)]
    growth = [after.seconds - before.seconds for before, after in pairwise(steps)]
    assert growth[1] == pytest.approx(2 * growth[0], rel=0.02)
    assert growth[0] == pytest.approx(32 * 8 * 4 * (1024 / 32) * 1e-6, rel=0.02)


def test_windows_bound_it() -> None:
    windowed = replace(SPEC, layers=(replace(LAYER, attention=replace(LAYER.attention, window_len=256)),) * 8)
    found = predictor(windowed)
    assert found.decode(8, 2048).seconds == pytest.approx(found.decode(8, 8192).seconds, rel=0.01)
    assert found.decode(8, 128).seconds < found.decode(8, 256).seconds < found.decode(8, 2048).seconds * 1.01


def test_more_never_takes_less() -> None:
    found = predictor()
    for context_len in (32, 1000):
        times = [found.decode(batch, context_len).seconds for batch in (1, 2, 4, 8, 16, 33, 64, 200)]
        assert times == sorted(times)
    for kinds in ("q4", "f32"):
        assert found.decode(3, 100).seconds <= predictor(format_name=kinds).decode(3, 100).seconds


def test_a_small_model_runs_from_the_caches() -> None:
    small = replace(SPEC, layers=(LAYER,), vocab_size=512)
    weights = LAYER_WEIGHTS + 512 * 1024
    assert predictor(small).decode(1, 32).binding["weights"] == pytest.approx(0.25e-9 * weights, rel=0.05)


def test_an_unmeasured_format_is_taken_for_the_nearest() -> None:
    times = {name: predictor(format_name=name).decode(4, 100).seconds for name in ("q4", "q4_offset", "f32", "bf16")}
    assert times["q4"] == times["q4_offset"] < times["bf16"] <= times["f32"]


@pytest.mark.parametrize(("num_kv_heads", "rounds"), [(1, 1), (2, 1), (3, 2), (9, 5)])
def test_few_tasks_leave_threads_idle(num_kv_heads: int, rounds: int) -> None:
    """A page of a sequence's head is one thread's; a figure is of both threads at work."""
    heads = replace(LAYER.attention, num_heads=4 * num_kv_heads, num_kv_heads=num_kv_heads)
    predicted = predictor(replace(SPEC, layers=(replace(LAYER, attention=heads),) * 8)).decode(1, 32)
    attention_s = sum(op.seconds for op in predicted.ops if isinstance(op.call, AttentionCall))
    assert attention_s == pytest.approx(8 * rounds * 2 * 1e-6)


def test_drawing_costs_more_than_the_likeliest() -> None:
    found = predictor()
    spans = [Span(99, 1)] * 4
    more_s = found.step(spans, 4, greedy=False).seconds - found.step(spans, 4).seconds
    assert more_s == pytest.approx(2 * 32_768 * 1e-9)  # four rows on two threads


def test_experts_take_those_that_rows_choose() -> None:
    layer = replace(LAYER, mlp=Mlp(512, "silu"), experts=Experts(32, 4, True))
    found = predictor(replace(SPEC, layers=(layer,) * 8))
    one, many = found.decode(1, 32).seconds, found.decode(64, 32).seconds
    whole = predictor(replace(SPEC, layers=(replace(LAYER, mlp=Mlp(4 * 512, "silu")),) * 8)).decode(1, 32).seconds
    assert one == pytest.approx(whole, rel=0.05)
    assert many > 3 * one
