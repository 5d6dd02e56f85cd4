"""The least time of a step, as it is worked out for each step of a server, is that of the counted costs."""

from dataclasses import replace

import pytest
from tiny_llm import tiny_llm

from strop.core.config import EngineConfig
from strop.core.request import Request, SamplingParams
from strop.engine.costs import CostModel
from strop.engine.engine import Engine
from strop.engine.limit import StepLimit, step_limit
from strop.engine.step_plan import StepRow
from strop.machine.probe import MachineRates
from strop.ops import native

RATES = {
    "compute": MachineRates("any", 2, 1, {"int8": 2e3, "bf16": 7e2, "f32": 1e2}, 1e12, 1e12),
    "memory": MachineRates("any", 2, 1, {"int8": 2e15, "bf16": 7e15, "f32": 1e15}, 1e3, 2e3),
}


def row(start: int, count: int, wants_token: bool = True) -> StepRow:
    return StepRow(0, start, count, (0,) * count, (), 0, 0, wants_token, 0)


@pytest.fixture(scope="module", params=["llama", "mixtral", "mistral window"])
def costs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CostModel:
    if not native.register():
        pytest.skip("needs the native library")
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    path.write_bytes(tiny_llm("mixtral" if request.param == "mixtral" else "llama", tied=False).build())
    engine = Engine.load(str(path), EngineConfig(max_context_len=64))
    spec = engine.spec
    if request.param == "mistral window":
        first, second = spec.layers
        spec = replace(spec, layers=(replace(first, attention=replace(first.attention, window_len=8)), second))
    return CostModel(engine.params, spec, engine.layout)


@pytest.mark.parametrize("bound", RATES)
def test_equals_the_counted_costs(costs: CostModel, bound: str) -> None:
    rates = RATES[bound]
    limit = StepLimit(costs, rates)
    for lens in ([1], [40], [3, 8, 9, 33]):
        counted = costs.step(len(lens), len(lens), lens).limit_s(rates)
        assert limit.seconds([row(n - 1, 1) for n in lens]) == pytest.approx(counted, rel=1e-9)
    for start, count in ((0, 5), (0, 8), (0, 30), (3, 20), (6, 9), (20, 4)):
        counted = costs.step(count, 1, [start + count], count).limit_s(rates)
        assert limit.seconds([row(start, count)]) == pytest.approx(counted, rel=1e-9)


def test_a_step_without_a_token_does_not_read_the_head(costs: CostModel) -> None:
    limit = StepLimit(costs, RATES["memory"])
    head_bytes = costs.params.weights["head"].bytes_per_matrix
    saved_s = limit.seconds([row(0, 8)]) - limit.seconds([row(0, 8, wants_token=False)])
    assert saved_s == pytest.approx(head_bytes / 2e3, rel=1e-9)


def test_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not native.register():
        pytest.skip("needs the native library")
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    path.write_bytes(tiny_llm().build())
    engine = Engine.load(str(path), EngineConfig(max_context_len=64))
    limit = step_limit(engine)
    engine.add(Request("r", (5, 6, 7), SamplingParams(max_tokens=3, temperature=0.0)))
    assert engine.last_step.rows == ()
    while engine.has_unfinished:
        engine.step()
        assert [row.count for row in engine.last_step.rows] in ([3], [1])
        assert limit is None or 0 < limit.seconds(engine.last_step.rows) < 1  # None: too busy a machine
