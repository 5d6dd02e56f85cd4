"""The budgets of a server by a machine's plan; the machine here is made up, and so are its times."""

from typing import Any

import pytest
from made_up_profile import profile, rising
from test_plan_local import SPEC

from strop.core.config import EngineConfig
from strop.core.errors import OverloadError
from strop.engine.messages import Expected
from strop.machine.profile import Sized
from strop.models.abstract import abstract_parameters
from strop.plan.latency import Pass
from strop.plan.local import Local, this_hardware
from strop.plan.serving import LEAST_CHUNK_TOKENS, LONGEST_STEP_S, MEAN_ITL_S, Budgets, budgets_of
from strop.serve.admission import UNPLANNED_REQUESTS, Admission


def planned(slowness: float = 1.0, **config: Any) -> tuple[Budgets, Local]:
    per_row, least = slowness * 0.125e-10 * 2**20, slowness * 1e-10 * 2**20
    size = Sized(1 << 20, rising(per_row, least), rising(per_row, least))
    figures = profile(linear={"q4": (size,), "f32": (size,)})
    machines = this_hardware(figures)
    asked = EngineConfig(**{"max_num_seqs": 0, "max_step_tokens": 0, **config})
    params = abstract_parameters(SPEC, lambda path: "q4", "native", num_positions=1)
    model = Local(SPEC, params, figures, asked, machines)
    return budgets_of(model, SPEC, machines, asked), model


def step_s(model: Local, batch: int) -> float:
    return model.pass_time(Pass(batch, 1, 576)).seconds


def test_as_many_sequences_as_each_still_gets_its_tokens() -> None:
    budgets, model = planned()
    assert step_s(model, budgets.max_num_seqs) < MEAN_ITL_S
    assert budgets.max_num_seqs > 1


def test_chunks_hold_answers_up_little_and_steps_are_short() -> None:
    budgets, model = planned()
    chunk_s = model.pass_time(Pass(1, budgets.max_chunk_tokens, max(288, budgets.max_chunk_tokens))).seconds
    assert chunk_s <= step_s(model, budgets.max_num_seqs)
    assert model.pass_time(Pass(1, budgets.max_step_tokens - budgets.max_num_seqs, 576)).seconds < 1.1 * LONGEST_STEP_S


def test_a_slower_machine_takes_less_at_once() -> None:
    fast, slow, slowest = (planned(slowness)[0] for slowness in (1, 10, 1000))
    assert fast.max_num_seqs > slow.max_num_seqs >= slowest.max_num_seqs >= 1
    assert fast.expected.prompt_tokens_per_s > slow.expected.prompt_tokens_per_s
    assert slowest.max_chunk_tokens == LEAST_CHUNK_TOKENS


def test_what_is_given_is_taken() -> None:
    budgets, _ = planned(10, max_num_seqs=77)
    assert budgets.max_num_seqs == 77
    assert "77 sequences at once" in budgets.expected.words


def test_the_queue_is_a_minutes_work() -> None:
    def room(admission: Admission) -> int:
        for count in range(1000):
            try:
                admission.enter()
            except OverloadError:
                return count
        raise AssertionError("no end")

    expected = Expected(0.5, 100.0, "")
    planned, given = Admission(), Admission(2, 0)
    planned.expect(expected)
    given.expect(expected)
    assert [room(one) for one in (Admission(), planned, given)] == [UNPLANNED_REQUESTS, 30, 2]
    for one in (planned, given):
        one.num_tokens = 5_000
        one.weigh(1_000)
        with pytest.raises(OverloadError, match="prompts of 5000 tokens are waiting"):
            one.weigh(1_001)
