"""What `strop serve` takes at once, and lets wait, where nobody says: by this machine's plan for the model."""

import logging
from dataclasses import dataclass, replace

from strop.core.config import EngineConfig
from strop.core.errors import StropError
from strop.engine.loading import Runner, no_kernels, resolve
from strop.engine.messages import Expected
from strop.formats.checkpoint import open_checkpoint
from strop.machine.catalog import Machines
from strop.models.reader import load_spec
from strop.models.spec import ModelSpec
from strop.plan.calibrate import machine_profile
from strop.plan.candidate import Candidate
from strop.plan.latency import Pass
from strop.plan.local import Local, stored_copy, this_hardware
from strop.plan.objective import Latency, Objective
from strop.plan.search import Wish, milliseconds, search
from strop.plan.traffic import Traffic, traffic_for

log = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEAN_ITL_S = 0.2
"""Five tokens a second are about what people read: more sequences at once are taken as long as each gets so many."""
ENOUGH_THROUGHPUT = 0.95
"""Of the most: more sequences at once let fewer wait."""
LONGEST_STEP_S = 0.25
"""Of prompts alone: what comes meanwhile waits so long before it is looked at."""
LEAST_CHUNK_TOKENS = 16
"""Fewer would read the weights more often than they fill a kernel's rows."""
UNPLANNED = EngineConfig(max_num_seqs=32, max_step_tokens=256, max_chunk_tokens=64)
"""What is taken where there is nothing to plan with: no native kernels, several devices, or a model that pools."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Of one server."""

    max_num_seqs: int
    max_step_tokens: int
    max_chunk_tokens: int
    expected: Expected


def settle(model: str, config: EngineConfig, runner: Runner) -> tuple[EngineConfig, Expected | None]:
    """`config` with a number for each budget that is 0, and what the machine is expected to do with them.

    What the model or the machine does not let be planned gets `UNPLANNED`, and a line in the log that says why. Takes
    some seconds on a machine that was never calibrated or probed.
    """
    wanted = ("max_num_seqs", "max_step_tokens", "max_chunk_tokens")
    fixed = replace(config, **{name: getattr(config, name) or getattr(UNPLANNED, name) for name in wanted})
    if config.mesh or runner == "pooling" or fixed == config:
        return fixed, None
    try:
        checkpoint = open_checkpoint(model)
        spec = load_spec(checkpoint)
        if not spec.causal:
            return fixed, None
        if reason := no_kernels(spec, resolve(fixed, spec)):
            log.info("nothing is planned: %s", reason)
            return fixed, None
        profile = machine_profile(config.num_threads)
        machines = this_hardware(profile)
        budgets = budgets_of(stored_copy(checkpoint, spec, profile, config, machines), spec, machines, config)
    except StropError as error:
        log.warning("nothing is planned, and fixed budgets are taken: %s", error)
        return fixed, None
    settled = replace(
        config,
        max_num_seqs=budgets.max_num_seqs,
        max_step_tokens=config.max_step_tokens or budgets.max_step_tokens,
        max_chunk_tokens=config.max_chunk_tokens or budgets.max_chunk_tokens,
    )
    return settled, budgets.expected


def budgets_of(model: Local, spec: ModelSpec, machines: Machines, config: EngineConfig) -> Budgets:
    """By predicted times, for requests of the usual lengths.

    As many sequences at once as cost no throughput, while each gets its next token after MEAN_ITL_S, or twice what a
    single one needs; chunks of prompts that take no longer than a step of all answers; and steps of prompts alone
    that take LONGEST_STEP_S. Raises CapacityError if the model does not fit.
    """
    traffic = traffic_for(spec, None)
    if config.max_context_len:
        traffic = replace(traffic, context_len=min(traffic.context_len, config.max_context_len))
    seen = traffic.input_tokens + traffic.output_tokens // 2
    alone_s = model.pass_time(Pass(1, 1, seen)).seconds + model.pass_time(Pass(1, LEAST_CHUNK_TOKENS, seen)).seconds
    bounds_s: dict[Latency, float] = {} if config.max_num_seqs else {"itl": max(MEAN_ITL_S, 2 * alone_s)}
    batches = (config.max_num_seqs,) if config.max_num_seqs else BATCHES
    objective = Objective(bounds_s, "throughput")
    wish = Wish(spec, machines, traffic, objective, batches=batches, groups_prompts=False)
    plan = search(wish, [model])
    able = [one for one in plan.candidates if all(one.latency_s(name) <= s for name, s in bounds_s.items())]
    enough = ENOUGH_THROUGHPUT * plan.chosen.requests_per_s
    chosen = max((one for one in able if one.requests_per_s >= enough), key=lambda one: (one.batch, one.requests_per_s))
    return _budgets(model, chosen, traffic, seen)


def _budgets(model: Local, chosen: Candidate, traffic: Traffic, seen: int) -> Budgets:
    def longest(most_s: float) -> int:
        """Tokens of a prompt, a power of two, that take at most so long."""
        count = LEAST_CHUNK_TOKENS
        while count < seen and model.pass_time(Pass(1, 2 * count, max(2 * count, seen // 2))).seconds <= most_s:
            count *= 2
        return count

    chunk = longest(chosen.decode.seconds)
    tokens_per_s = chunk / model.pass_time(Pass(1, chunk, max(chunk, seen // 2))).seconds
    step_tokens = chosen.batch + max(chunk, longest(LONGEST_STEP_S))
    words = (
        f"planned for this machine: {chosen.batch} sequences at once, prompts in chunks of {chunk} tokens beside them; "
        f"requests of {traffic.input_tokens} + {traffic.output_tokens} tokens should then take "
        f"{milliseconds(chosen.itl_s)} a token, {60 * chosen.requests_per_s:.3g} of them a minute"
    )
    return Budgets(chosen.batch, step_tokens, chunk, Expected(chosen.requests_per_s, tokens_per_s, words))
