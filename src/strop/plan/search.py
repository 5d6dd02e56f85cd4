"""The configurations of a model on machines, the best of them, and the one to run."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from strop.core.config import GIB
from strop.core.errors import CapacityError, RequestError
from strop.machine.catalog import Machines
from strop.models.mesh import MeshShape
from strop.models.spec import ModelSpec
from strop.plan.candidate import MOST_LOAD, Candidate
from strop.plan.choose import SAME_WEIGHTS
from strop.plan.latency import Coefficients, Pass
from strop.plan.objective import Objective
from strop.plan.passes import Network, Partitioned, PassModel
from strop.plan.space import BATCHES, WEIGHT_DTYPES, divisors, indivisible, meshes, prompt_passes
from strop.plan.traffic import Traffic

BALANCE = 2.0
"""How many times the fastest's latency the aim `balance` lets a cheaper configuration take."""


@dataclass(frozen=True)
class Wish:
    """What to plan for."""

    spec: ModelSpec
    machines: Machines
    traffic: Traffic
    objective: Objective = field(default_factory=Objective)
    coefficients: Coefficients = field(default_factory=Coefficients)
    mesh: MeshShape | None = None
    """None: any."""
    weight_dtypes: tuple[str, ...] = WEIGHT_DTYPES
    price_per_device_hour: float | None = None
    batches: tuple[int, ...] = BATCHES
    groups_prompts: bool = True
    """Whether prompts wait for each other to share a pass. Strop's engine takes what comes: one, or a whole batch."""

    @property
    def takes_whole_batches(self) -> bool:
        """Whether all requests may begin and end together, as offline; with arrivals or bounds they come one by one."""
        return self.traffic.rate_per_s is None and not self.objective.bounds_s


@dataclass(frozen=True)
class Plan:
    """What was found."""

    wish: Wish
    chosen: Candidate
    reason: str
    frontier: tuple[Candidate, ...]
    """From the fastest to the cheapest: none other is both faster and cheaper. All keep the bounds."""
    candidates: tuple[Candidate, ...]
    """All that fit memories."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "hardware": {"name": self.wish.machines.device.name, "devices": self.wish.machines.num_devices},
            "chosen": self.chosen.as_json(),
            "reason": self.reason,
            "frontier": [candidate.as_json() for candidate in self.frontier],
            "num_candidates": len(self.candidates),
        }


def search(wish: Wish, models: Iterable[PassModel] | None = None) -> Plan:
    """Tries all configurations.

    Args:
        models: the copies to choose from; None: partitioned over the wish's hardware in every way.

    Raises:
        CapacityError: nothing fits, with what would be needed.
        RequestError: a given mesh does not divide the model, no candidate keeps the objective's bounds (with the best
            that can be reached, and what binds it), or the traffic's rate is out of reach.
    """
    copies: list[PassModel] = list(every_copy(wish) if models is None else models)
    candidates = tuple(candidate for model in copies for candidate in _of_model(model, wish))
    if not candidates:
        raise _too_large(copies, wish)
    in_bounds = [one for one in candidates if _excess(one, wish.objective) <= 1]
    if not in_bounds:
        raise _out_of_bounds(candidates, wish)
    able = [one for one in in_bounds if one.copies * one.num_devices <= wish.machines.num_devices]
    if not able:
        most = max(in_bounds, key=lambda one: one.requests_per_s / one.num_devices)
        capacity = MOST_LOAD * most.requests_per_s * (wish.machines.num_devices // most.num_devices)
        raise RequestError(
            f"traffic rate={wish.traffic.rate_per_s:g}: {wish.machines.num_devices} of {wish.machines.device.name} "
            f"take at most {capacity:.3g} requests/s at {MOST_LOAD:.0%} load"
            f"{' within the bounds' if wish.objective.bounds_s else ''} ({describe(most)}; {most.binds} binds): lower "
            "the rate, allow more latency, or give more devices"
        )
    frontier = pareto(able)
    chosen, reason = _choose(frontier, able, wish)
    return Plan(wish, chosen, reason, frontier, candidates)


def every_copy(wish: Wish) -> Iterator[Partitioned]:
    """Every way to lay the model over some of the devices.

    Raises:
        RequestError: no mesh divides the model.
    """
    problems = []
    used = divisors(wish.machines.num_devices) if wish.mesh is None else [wish.mesh.size()]
    possible = False
    for num_devices in used:
        network = Network(wish.spec, num_devices)
        for mesh in meshes(wish.machines.device, num_devices) if wish.mesh is None else [wish.mesh]:
            if problem := indivisible(network.spec, mesh):
                problems.append(problem)
                continue
            possible = True
            for layouts in SAME_WEIGHTS if num_devices > 1 else SAME_WEIGHTS[:1]:
                for dtype in wish.weight_dtypes:
                    yield Partitioned(network, wish.machines.device, mesh, layouts, dtype, wish.coefficients)
    if not possible:
        raise RequestError(problems[0])


def _of_model(model: PassModel, wish: Wish) -> Iterator[Candidate]:
    """Its batches, each with all ways to take prompts in."""
    traffic = wish.traffic
    if model.weight_bytes > model.usable_bytes:
        return
    prompts = [(step, count, model.pass_time(step)) for step, count in prompt_passes(traffic, max(wish.batches))]
    for batch in wish.batches:
        decode = model.pass_time(Pass(batch, 1, traffic.input_tokens + traffic.output_tokens // 2))
        found = []
        for step, count, time in prompts:
            if step.batch > batch or not (wish.groups_prompts or step.batch in (1, batch)):
                continue
            made = Candidate(model, traffic, batch, step, count, time, decode, 1, wish.price_per_device_hour)
            if made.fits and (wish.takes_whole_batches or _flows(made)):
                found.append(_copied(made, wish))
        yield from found


def _flows(one: Candidate) -> bool:
    """Whether requests can come and go one by one: with a pass of prompts per step at most, as an engine's steps go."""
    return (one.batch > one.prompt_pass.batch or one.batch == 1) and one.passes_per_step <= 1


def _copied(one: Candidate, wish: Wish) -> Candidate:
    copies = wish.machines.num_devices // one.num_devices
    if wish.traffic.rate_per_s is not None:
        copies = math.ceil(wish.traffic.rate_per_s / (MOST_LOAD * one.requests_per_s))
    object.__setattr__(one, "copies", copies)
    return one


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in both end-to-end latency and cost, the fastest first."""
    found: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.e2e_s, one.device_s_per_request, one.num_devices, one.batch)):
        if not found or one.device_s_per_request < found[-1].device_s_per_request:
            found.append(one)
    return tuple(found)


def _choose(frontier: Sequence[Candidate], able: Sequence[Candidate], wish: Wish) -> tuple[Candidate, str]:
    objective = wish.objective
    within = " that keeps the bounds" if objective.bounds_s else ""
    match objective.aim:
        case "latency":
            return frontier[0], f"the fastest{within}"
        case "throughput":
            devices = wish.machines.num_devices
            most = max(able, key=lambda one: (devices // one.num_devices * one.requests_per_s, -one.e2e_s))
            return most, f"most tokens per second of all devices together{within}"
        case "cost":
            return frontier[-1], f"the cheapest{within}"
        case "balance":
            near = [one for one in frontier if one.e2e_s <= BALANCE * frontier[0].e2e_s]
            return near[-1], f"the cheapest that takes at most {BALANCE:g} times as long as the fastest{within}"


def _excess(one: Candidate, objective: Objective) -> float:
    """How many times a bound it takes, of the bound it misses by most."""
    return max((one.latency_s(name) / bound_s for name, bound_s in objective.bounds_s.items()), default=0.0)


def _out_of_bounds(candidates: Sequence[Candidate], wish: Wish) -> RequestError:
    bounds_s = wish.objective.bounds_s
    alone = []
    for name, bound_s in bounds_s.items():
        best = min(candidates, key=lambda one: one.latency_s(name))
        if best.latency_s(name) > bound_s:
            alone.append(
                f"{name} is at least {milliseconds(best.latency_s(name))} ({describe(best)}; "
                f"{best.prompt_binds if name == 'ttft' else best.binds} binds)"
            )
    nearest = min(candidates, key=lambda one: _excess(one, wish.objective))
    reached = ",".join(f"{name}={milliseconds(_rounded_up(nearest.latency_s(name)))}" for name in bounds_s)
    return RequestError(
        f"objective: no configuration keeps {', '.join(f'{name}={milliseconds(s)}' for name, s in bounds_s.items())}: "
        + "".join(f"{text}; " for text in alone)
        + f"the nearest reaches {reached} ({describe(nearest)}; {nearest.prompt_binds} binds prompts, {nearest.binds} "
        "decode): raise the bounds to that, or give more or faster devices"
    )


def _too_large(copies: Sequence[PassModel], wish: Wish) -> CapacityError:
    device, traffic = wish.machines.device, wish.traffic
    model = max(copies, key=lambda model: (model.num_devices, -model.weight_bytes))
    used, dtype = model.num_devices, model.weight_dtype
    given = wish.machines.num_devices if wish.mesh is None else used
    shared = "" if used == given else f" (the model's dimensions are not shared evenly by all {given})"
    limit = model.usable_bytes
    needed = 1 << math.ceil(model.weight_bytes * used / limit).bit_length()  # powers of two share dimensions evenly
    more = f"give {needed} devices or larger ones" if device.max_devices > 1 else "take a machine with more memory"
    smaller = "" if dtype == "int8" else "int8 weights, "
    weights, held = (f"{num_bytes / GIB:,.1f} GiB" for num_bytes in (model.weight_bytes * used, used * limit))
    sequence = f"{model.cache_bytes_per_token['batch'] * traffic.context_len / GIB:.2f} GiB"
    return CapacityError(
        f"the model does not fit: its {dtype} weights take {weights}, a sequence of {traffic.context_len:,} tokens "
        f"{sequence} more, and {used} of {device.name} hold {held} ({limit / device.memory_bytes:.0%} of their memory)"
        f"{shared}: {more}, {smaller}or shorter requests"
    )


def describe(one: Candidate) -> str:
    """A few words: `64 devices 4x4x4, int8, batch 32`."""
    mesh = str(one.model.mesh)
    devices = f"{one.num_devices} devices {mesh}" if one.num_devices > 1 else "1 device"
    return f"{devices}, {one.model.weight_dtype}, batch {one.batch}"


def _rounded_up(seconds: float) -> float:
    """To three digits, so that it is a bound which can be kept."""
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return math.ceil(seconds / unit) * unit


def milliseconds(seconds: float) -> str:
    """`0.53ms`, `28.5ms`, `1.82s`, as objectives are written."""
    return f"{seconds:.3g}s" if seconds >= 1 else f"{1e3 * seconds:.3g}ms"
