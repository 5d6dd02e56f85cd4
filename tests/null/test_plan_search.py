"""The search against brute force and against the layouts that Pope et al. chose; what every plan must hold."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.core.errors import CapacityError, RequestError
from strop.machine.catalog import find_machines
from strop.models.mesh import MeshShape
from strop.models.published import published_spec
from strop.models.spec import ModelSpec
from strop.plan.candidate import MOST_LOAD, Candidate
from strop.plan.emit import beyond_the_engine, engine_config, plan_file
from strop.plan.explain import explain
from strop.plan.latency import Coefficients, Pass, Placed, head_latency, layers_latency
from strop.plan.objective import Aim, Objective, parse_objective
from strop.plan.passes import USABLE_MEMORY
from strop.plan.search import Plan, Wish, pareto, search
from strop.plan.space import divisors, indivisible, meshes, padded, parse_mesh
from strop.plan.traffic import Traffic, parse_traffic
from strop.plan.validate import pope_coefficients
from strop.plan.volumes import FFN_LAYOUTS, GATHERED

PAPER_TRAFFIC = parse_traffic("in=1984,out=64")


def wish(model: str, hardware: str, traffic: str = "in=512,out=128", objective: str = "", **rest: object) -> Wish:
    machines = find_machines(hardware)
    found = Wish(
        published_spec(model), machines, parse_traffic(traffic), parse_objective(objective), pope_coefficients()
    )
    return replace(found, **rest)  # type: ignore[arg-type]


@cache
def planned(model: str, hardware: str, traffic: str = "in=512,out=128", objective: str = "") -> Plan:
    return search(wish(model, hardware, traffic, objective))


def layouts(one: Candidate) -> tuple[str, str, str, str]:
    assert one.prompt.placed is not None and one.decode.placed is not None
    return one.prompt.placed.layout, one.prompt.placed.sharding, one.decode.placed.layout, one.decode.placed.sharding


def test_palm_540b_on_64_chips_is_laid_out_as_in_the_paper() -> None:
    """Table 2: low latency is one prompt in 2D over heads, decode in 2D over the batch; high throughput gathers."""
    candidates = planned("palm-540b", "tpu-v4x64", "in=1984,out=64").candidates
    whole = [one for one in candidates if one.num_devices == 64 and one.passes_per_prompt == 1]
    low, high = (
        min(
            (one for one in whole if (one.batch, one.prompt_pass.batch, one.model.weight_dtype) == case),
            key=lambda one: one.e2e_s,
        )
        for case in ((64, 1, "int8"), (512, 512, "bf16"))
    )
    assert layouts(low) == ("ws2d", "heads", "ws2d", "batch")
    assert layouts(high) == ("wg_xyz", "batch", "ws2d", "batch")
    assert low.model.mesh == high.model.mesh == (4, 4, 4)
    assert low.model.network.num_heads == 64
    # Table 2, whose prompts are a little longer: 0.29 s and 85.2 s, 1.82 s and 6.0 s for 64 tokens
    for one, prompt_s, answer_s in ((low, 0.29, 1.82), (high, 85.2, 6.0)):
        assert one.prompt.seconds == pytest.approx(prompt_s, rel=0.15)
        assert 64 * one.decode.seconds == pytest.approx(answer_s, rel=0.15)


def brute_force(asked: Wish) -> set[tuple[float, float]]:
    """(end-to-end latency, device-seconds per request) of all that fits, from the latency model alone."""
    found = set()
    tokens_in, tokens_out = asked.traffic.input_tokens, asked.traffic.output_tokens
    spec, device, coefficients = asked.spec, asked.machines.device, asked.coefficients

    def fastest(step: Pass, mesh: MeshShape, group: tuple[str, ...], dtype: str) -> float:
        times = []
        for layout, sharding in product(group, ("heads", "batch")):
            shards = mesh.size(GATHERED[layout])  # type: ignore[index]
            needed = mesh.size() if sharding == "batch" and step.new_tokens > 1 else shards
            if step.batch < needed or (layout == "wg_xyz" and sharding == "heads"):
                continue
            placed = Placed(device, mesh, layout, sharding, dtype)  # type: ignore[arg-type]
            layers_s = layers_latency(spec, step, placed, coefficients).total
            times.append(layers_s + head_latency(spec, step, placed, coefficients, rows=step.batch).total)
        return min(times)

    groups = (("ws1d",), tuple(layout for layout in FFN_LAYOUTS if layout != "ws1d"))
    for num_devices in (1, 2, 4):
        shapes = [MeshShape(x, num_devices // x) for x in (1, 2, 4) if num_devices % x == 0]
        for mesh, group, dtype, power in product(shapes, groups, ("bf16", "int8"), range(11)):
            batch = 2**power
            step_s = fastest(Pass(batch, 1, tokens_in + tokens_out // 2), mesh, group, dtype)
            ways = [(2**i, tokens_in, tokens_in, 1) for i in range(power + 1)]
            ways += [(1, c, (tokens_in + c) // 2, -(-tokens_in // c)) for c in (64, 128, 256) if c < tokens_in]
            for at_once, new, seen, passes in ways:
                pass_s = fastest(Pass(at_once, new, seen), mesh, group, dtype)
                round_s = tokens_out * step_s + batch / at_once * passes * pass_s
                others = batch > at_once
                ttft_s = passes * (pass_s + (step_s if others else 0))
                itl_s = step_s + (batch / at_once - 1) * passes * pass_s / tokens_out
                found.add((ttft_s + (tokens_out - 1) * itl_s, num_devices * round_s / batch))
    return found


def test_the_frontier_is_that_of_brute_force() -> None:
    spec = published_spec("palm-8b")
    small: ModelSpec = replace(spec, layers=spec.layers[:2])  # memory never binds
    asked = wish("palm-8b", "h200x4", "in=300,out=20", spec=small)
    points = sorted(brute_force(asked))
    expected: list[tuple[float, float]] = []
    for point in points:
        if not expected or point[1] < expected[-1][1] * (1 - 1e-12):
            expected.append(point)
    found = [(one.e2e_s, one.device_s_per_request) for one in search(asked).frontier]
    assert found == [pytest.approx(point, rel=1e-9) for point in expected]


CASES = [
    ("palm-540b", "tpu-v4x64", "in=512,out=128", ""),
    ("palm-62b", "h200x8", "in=512,out=128,rate=4", "ttft=200ms,itl=30ms"),
    ("palm-8b", "l4x8", "in=1024,out=64", "throughput"),
    ("mt-nlg-530b", "tpu-v5px64", "in=1000,out=1000", "latency"),
    ("palm-8b", "rtx-4090", "in=64,out=64,rate=1", "cost"),
]


@pytest.mark.parametrize("case", CASES)
def test_what_every_plan_holds(case: tuple[str, str, str, str]) -> None:
    plan = planned(*case)
    traffic, machines = plan.wish.traffic, plan.wish.machines
    assert plan.frontier and plan.chosen in plan.candidates
    for one, two in zip(plan.frontier, plan.frontier[1:], strict=False):
        assert one.e2e_s < two.e2e_s and one.device_s_per_request > two.device_s_per_request
    for one in (*plan.frontier, plan.chosen):
        assert one.memory_bytes <= USABLE_MEMORY * machines.device.memory_bytes
        assert one.longest_context_tokens >= traffic.context_len
        assert one.num_devices * one.copies <= machines.num_devices
        assert machines.num_devices % one.num_devices == 0
        assert all(one.latency_s(name) <= bound_s for name, bound_s in plan.wish.objective.bounds_s.items())
        assert 0 < one.mfu < 1 and 0 < one.mbu < 1
        assert one.decode.seconds <= one.itl_s <= one.max_itl_s
        if not plan.wish.takes_whole_batches:
            assert one.prompt_pass.batch < one.batch or one.batch == 1
            assert one.passes_per_step <= 1
        if traffic.rate_per_s:
            assert traffic.rate_per_s <= MOST_LOAD * one.copies * one.requests_per_s * (1 + 1e-9)


def test_aims() -> None:
    plans = {aim: planned("palm-62b", "tpu-v4x16", "in=512,out=128", aim) for aim in ("latency", "cost", "balance")}
    fast, cheap, between = (plans[aim].chosen for aim in ("latency", "cost", "balance"))
    assert fast.e2e_s == min(one.e2e_s for one in plans["latency"].candidates)
    assert cheap.device_s_per_request == min(one.device_s_per_request for one in plans["cost"].candidates)
    assert fast.e2e_s < between.e2e_s <= 2 * fast.e2e_s
    assert cheap.device_s_per_request < between.device_s_per_request < fast.device_s_per_request
    most = planned("palm-62b", "tpu-v4x16", "in=512,out=128", "throughput").chosen
    assert most.device_s_per_request == pytest.approx(cheap.device_s_per_request)


def test_bounds_narrow_the_frontier() -> None:
    free, bound = planned("palm-62b", "h200x8"), planned("palm-62b", "h200x8", "in=512,out=128", "itl=20ms,ttft=1s")
    assert min(one.e2e_s for one in bound.frontier) >= min(one.e2e_s for one in free.frontier)
    assert bound.chosen.device_s_per_request >= free.frontier[-1].device_s_per_request
    assert bound.chosen.itl_s <= 0.020


def test_a_short_gap_between_tokens_asks_for_chunks() -> None:
    plan = planned("palm-62b", "h200x4", "in=1900,out=100", "max_itl=60ms,cost")
    assert plan.chosen.passes_per_prompt > 1
    assert plan.chosen.max_itl_s <= 0.060


def test_chunked_prompts_take_longer_in_all() -> None:
    for one in search(wish("palm-8b", "l4")).candidates:
        if one.passes_per_prompt > 1:
            assert one.passes_per_prompt * one.prompt_pass.new_tokens >= 512


def test_a_rate_asks_for_as_many_copies_as_it_takes() -> None:
    few, many = (planned("palm-8b", "l4x8", f"in=512,out=128,rate={rate}", "cost").chosen for rate in (1, 30))
    assert few.copies * few.num_devices == 1
    assert 4 <= many.copies * many.num_devices <= 8
    assert many.device_s_per_request == pytest.approx(many.copies * many.num_devices / 30)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30))
def test_pareto(points: list[tuple[int, int]]) -> None:
    class Point:
        num_devices = batch = 1

        def __init__(self, e2e_s: int, cost: int) -> None:
            self.e2e_s, self.device_s_per_request = e2e_s, cost

    found = [(one.e2e_s, one.device_s_per_request) for one in pareto([Point(*point) for point in points])]  # type: ignore[misc]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert found == sorted(set(points) - beaten)


def test_cards_add_up() -> None:
    chosen = planned("palm-540b", "tpu-v4x64").chosen
    for card, seconds in zip(explain(chosen), (chosen.prompt.seconds, chosen.decode.seconds), strict=True):
        assert sum(row.seconds for row in card.rows) == pytest.approx(seconds)
        assert sum(card.parts_s.values()) == pytest.approx(seconds)
        assert sum(row.seconds for row in card.rows) == pytest.approx(card.seconds)
    matrices = 118 * (3 * 18432 * 73728 + 2 * 18432 * 64 * 256 + 2 * 18432 * 256)
    weights = [row for row in explain(chosen)[1].rows if row.name.startswith(("product", "keys"))]
    item_bytes = {"int8": 1, "bf16": 2}[chosen.model.weight_dtype]
    assert sum(row.memory_bytes for row in weights) == pytest.approx(matrices * item_bytes / chosen.num_devices)


def test_memory_of_table_1() -> None:
    """Multiquery over the batch: 30 % of memory hold 10,700 tokens at batch 512 on 64 chips."""
    found = [one for one in planned("palm-540b", "tpu-v4x64", "in=1984,out=64").candidates if one.batch == 512]
    over_batch = next(one for one in found if one.num_devices == 64 and layouts(one)[3] == "batch")
    assert over_batch.cache_bytes_per_token * over_batch.sequences_per_device * 10_700 == pytest.approx(
        0.3 * over_batch.model.device.memory_bytes, rel=0.01
    )


def test_heads_are_padded_only_where_devices_do_not_share_them() -> None:
    spec = published_spec("palm-540b")
    assert padded(spec, 16) is spec
    assert padded(spec, 64).layers[0].attention.num_heads == 64
    assert padded(spec, 5).layers[0].attention.num_heads == 50


def test_meshes() -> None:
    tpu, gpu, card = (find_machines(name).device for name in ("tpu-v4", "h200", "tpu-v5e"))
    assert meshes(tpu, 64) == [(4, 4, 4)]
    assert meshes(tpu, 16) == [(2, 2, 4), (2, 4, 2), (4, 2, 2)]
    assert meshes(gpu, 8) == [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1)]
    assert meshes(card, 32) == [(4, 8, 1), (8, 4, 1)]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_engine_config() -> None:
    chosen = planned("palm-62b", "h200x4", "in=1900,out=100", "max_itl=60ms,cost").chosen
    config = engine_config(chosen)
    assert (config.max_num_seqs, config.max_chunk_tokens) == (chosen.batch, chosen.prompt_pass.new_tokens)
    assert config.max_step_tokens == config.max_num_seqs + config.max_chunk_tokens
    assert config.max_context_len == 2000
    assert MeshShape(*map(int, config.mesh.split("x"))) == chosen.model.mesh
    assert config.layout in ("auto", layouts(chosen)[0])
    alone = engine_config(planned("palm-8b", "rtx-4090").chosen)
    assert (alone.mesh, alone.layout) == ("", "auto")


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_an_objective_out_of_reach_says_what_is_and_what_binds() -> None:
    asked = wish("palm-540b", "h200x8", objective="ttft=20ms,itl=1ms")
    with pytest.raises(RequestError, match=r"ttft is at least \d+ms \(8 devices .* binds\)") as caught:
        search(asked)
    nearest = str(caught.value).partition("the nearest reaches ")[2].partition(" (")[0]
    reached = search(replace(asked, objective=parse_objective(nearest))).chosen
    assert reached.ttft_s > 0.020 and reached.itl_s > 0.001


def test_a_rate_out_of_reach_says_what_is() -> None:
    with pytest.raises(RequestError, match=r"rate=1000: 8 of l4 take at most [\d.]+ requests/s at 80% load"):
        search(wish("palm-8b", "l4x8", "rate=1000"))


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(CapacityError, match=r"int8 weights take .* GiB, .* give 8 devices"):
        search(wish("palm-540b", "h100x2"))
    assert search(wish("palm-540b", "h100x8")).chosen.num_devices == 8  # as that says
    with pytest.raises(CapacityError, match=r"take devices with more memory, or shorter requests"):
        search(wish("palm-540b", "l4x8"))
    with pytest.raises(CapacityError, match=r"take a mesh of 32 devices or larger ones"):
        search(wish("palm-540b", "tpu-v4x64", mesh=MeshShape(2, 4)))
    with pytest.raises(CapacityError, match=r"1 of tpu-v4 hold .* \(the model's dimensions .* by all 61\)"):
        search(wish("palm-540b", "tpu-v4x61"))


def test_a_mesh_that_does_not_divide_says_which_axis_and_what_would() -> None:
    with pytest.raises(RequestError, match=r"15 devices do not divide the 64 of tpu-v4: take 1, 2, 4, 8"):
        parse_mesh("3x5", find_machines("tpu-v4x64"))
    with pytest.raises(RequestError, match=r"more axes than the torus of tpu-v5e, which has 2"):
        parse_mesh("2x2x2", find_machines("tpu-v5ex64"))
    for text in ("", "x", "0", "2x0", "2x2x2x2", "-4", "4.0", "²"):
        with pytest.raises(RequestError, match="mesh"):
            parse_mesh(text, find_machines("tpu-v4x64"))
    with pytest.raises(RequestError, match=r"mesh 5x12x1: x = 5 does not divide model_dim=18432; .*8, 9 would"):
        search(wish("palm-540b", "tpu-v4x60", mesh=MeshShape(5, 12)))
    assert indivisible(published_spec("palm-8b"), MeshShape(2, 3, 1)) == (
        "mesh 2x3x1: y times z = 3 does not divide ffn_dim=16384; 1, 2, 4 would"
    )


@pytest.mark.parametrize("aim", ["cost", "latency", "throughput", "balance"])
def test_ideal_machines_are_faster(aim: Aim) -> None:
    asked = wish("palm-8b", "tpu-v4x4")
    ideal = replace(asked, coefficients=Coefficients(), objective=Objective(aim="latency"))
    assert search(ideal).chosen.e2e_s < search(replace(asked, objective=Objective(aim="latency"))).chosen.e2e_s
    assert search(replace(asked, objective=Objective(aim=aim))).reason


def test_default_traffic_is_that_of_the_class() -> None:
    assert parse_traffic("") == Traffic()


def test_what_an_engine_cannot_be_told_is_said() -> None:
    chosen = planned("palm-540b", "tpu-v4x128", "in=512,out=128", "e2e=20s").chosen
    said = beyond_the_engine(chosen)
    assert any(text.startswith(f"{chosen.model.weight_dtype} weights") for text in said)
    assert chosen.prompt.placed is not None
    differs = chosen.prompt.placed.sharding != chosen.cache_sharding
    assert any("for prompts and answers" in text for text in said) == differs
    assert engine_config(chosen).attention == chosen.cache_sharding
    assert any(text.startswith(f"one of {chosen.copies} copies") for text in said) == (chosen.copies > 1)
    assert plan_file(planned("palm-8b", "l4"), "palm-8b")["plan"]["beyond_the_engine"] != []
