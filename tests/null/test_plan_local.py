"""Plans for this machine: a model's passes at the figures of a profile, here one whose every figure is round."""

from dataclasses import replace

import pytest
from made_up_profile import profile

from strop.core.config import EngineConfig
from strop.core.errors import CapacityError
from strop.machine.catalog import Machines
from strop.models.abstract import abstract_parameters
from strop.models.memory import fit_memory
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope
from strop.plan.explain import explain
from strop.plan.local import Local, this_hardware
from strop.plan.objective import parse_objective
from strop.plan.search import Plan, Wish, search
from strop.plan.traffic import parse_traffic

NORM = Norm("rms", 1e-6)
LAYER = LayerSpec(Attention(16, 4, 64, 0.125, Rope(1e4, 64)), Mlp(4096, "silu"), NORM, NORM)
WINDOWED = replace(LAYER, attention=replace(LAYER.attention, window_len=128))
SPEC = ModelSpec(1024, 32_768, (LAYER,) * 6 + (WINDOWED,) * 2, NORM, True, 8192)
LAYER_WEIGHTS = 1024 * (1536 + 1024 + 3 * 4096)


def copy_of(config: EngineConfig, num_bytes: int = 8 << 30) -> Local:
    machines = this_hardware(profile())
    machines = Machines(replace(machines.device, memory_bytes=num_bytes), 1)
    params = abstract_parameters(SPEC, lambda path: "q4", "native", num_positions=1)
    return Local(SPEC, params, profile(), config, machines)


def planned(traffic: str, objective: str = "", num_bytes: int = 8 << 30) -> Plan:
    model = copy_of(EngineConfig(), num_bytes)
    return search(Wish(SPEC, Machines(model.device, 1), parse_traffic(traffic), parse_objective(objective)), [model])


def test_a_step_reads_every_weight_at_the_speed_that_was_measured() -> None:
    chosen = planned("in=64,out=64", "latency").chosen
    assert chosen.batch == 1 and chosen.binds == "weights"
    weights_s = 1e-9 * (8 * LAYER_WEIGHTS + 32_768 * 1024)
    assert chosen.decode.seconds == pytest.approx(weights_s, rel=0.05)
    assert chosen.model.weight_dtype == "q4"
    assert 0.9 < chosen.mbu <= 1.01  # the profile's products read as fast as its memory does


def test_bounds_and_rates_are_kept_as_on_other_hardware() -> None:
    plan = planned("in=64,out=64,rate=0.05", "itl=300ms,max_itl=400ms")
    assert plan.chosen.itl_s <= 0.3 and plan.chosen.max_itl_s <= 0.4
    assert plan.chosen.copies == 1
    for one in plan.candidates:
        assert one.requests_per_s > 0


def test_the_card_adds_up() -> None:
    chosen = planned("in=512,out=64").chosen
    for card in explain(chosen):
        assert sum(row.seconds for row in card.rows) == pytest.approx(card.seconds)
        assert sum(card.parts_s.values()) == pytest.approx(card.seconds)
        assert len({(row.name, row.binds) for row in card.rows}) == len(card.rows)
    products = [row for row in explain(chosen)[1].rows if row.name.startswith("product 1024 x 1536")]
    assert sum(row.flops for row in products) == 2 * 8 * chosen.batch * 1024 * 1536
    windows = [row for row in explain(chosen)[1].rows if row.name == "attention 16 x 64, window 128"]
    seen = chosen.batch * 128
    assert sum(row.flops for row in windows) == 2 * 4 * 16 * 64 * seen


def test_memory_is_the_engines_own_plan() -> None:
    chosen = planned("in=512,out=64", "throughput").chosen
    config = EngineConfig(
        max_num_seqs=chosen.batch,
        max_step_tokens=chosen.batch + chosen.prompt_pass.tokens,
        max_context_len=576,
        num_blocks=chosen.batch * 18 + 1,
    )
    engine = fit_memory(int(chosen.model.weight_bytes), SPEC, config, "native", available_bytes=8 << 30)
    assert chosen.activation_bytes == engine.activation_bytes
    assert chosen.cache_bytes >= 0.9 * engine.cache_bytes  # windows count as if they saw all
    assert chosen.model.runtime_bytes == engine.runtime_bytes and chosen.model.usable_bytes == 8 << 30
    assert chosen.memory_bytes == pytest.approx(engine.total_bytes, rel=0.05)
    assert chosen.as_json()["memory_bytes_per_device"]["total"] == round(chosen.memory_bytes)


def test_what_does_not_fit_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        CapacityError, match=r"and 1 of this-machine hold .* take a machine with more memory, or shorter"
    ):
        planned("in=64,out=64", num_bytes=260 << 20)


def test_int8_keys_and_values_take_about_half() -> None:
    full, half = (copy_of(EngineConfig(kv_dtype=name)).cache_bytes_per_token["heads"] for name in ("bf16", "int8"))
    assert 0.5 * full < half < 0.6 * full
