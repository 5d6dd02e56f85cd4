"""What an engine's step takes outside the kernels: scheduling, packing, the call, and taking in the tokens."""

import time
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from strop.core.config import GIB, EngineConfig
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel
from strop.machine.probe import KernelClock
from strop.machine.profile import Curve
from strop.models.abstract import abstract_parameters, parameter_bytes
from strop.models.memory import fit_memory
from strop.models.parameters import Parameters
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope
from strop.ops import native

_NUM_STEPS = 12
_PROMPT_LEN = 256

_NORM = Norm("rms", 1e-6)
_LAYER = LayerSpec(Attention(8, 2, 64, 0.125, Rope(1e4, 64)), Mlp(2048, "silu"), _NORM, _NORM)
_SPEC = ModelSpec(512, 32_768, (_LAYER,) * 4, _NORM, True, 1024)
"""Small, but a step goes through more than a core's own caches: Python then runs from outside of them, as it will."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a step."""

    step_s: Curve
    """By sequences."""
    token_s: float
    """More, per token of a prompt."""


def measure_overhead(memory: np.ndarray, batches: tuple[int, ...]) -> Overhead:
    """Runs an engine on made-up weights, some of `memory` (uint8); takes about two seconds."""
    library = native.library()
    assert library is not None
    engine = made_up_engine(_SPEC, memory, EngineConfig(max(batches), 512, max_context_len=512, prefix_cache=False))
    clock = KernelClock(library)

    def outside_s() -> float:
        clock.lap_s()
        begin = time.perf_counter()
        engine.step()
        return time.perf_counter() - begin - clock.lap_s()

    step_s = []
    for batch in batches:
        for i in range(batch):
            _add(engine, f"{batch}-{i}", 4, _NUM_STEPS + 4)
        for _ in range(3):
            engine.step()
        step_s.append(median(outside_s() for _ in range(_NUM_STEPS)))
        while engine.has_unfinished:
            engine.step()
    prompts_s = []
    for i in range(5):
        _add(engine, f"prompt {i}", _PROMPT_LEN, 1)
        prompts_s.append(outside_s())
    token_s = max(0.0, median(prompts_s[1:]) - step_s[0]) / _PROMPT_LEN
    return Overhead(Curve(tuple(map(float, batches)), tuple(step_s)), token_s)


def made_up_engine(spec: ModelSpec, memory: np.ndarray, config: EngineConfig) -> Engine:
    """An engine whose packed weights all lie in `memory`, one over the other; it has no tokenizer to speak of."""
    params = abstract_parameters(spec, lambda path: "q4", "native", num_positions=config.max_context_len)
    made_up = jax.tree.map(lambda leaf: _array(leaf, memory), params)
    plan = fit_memory(parameter_bytes(params), spec, config, "native", available_bytes=16 * GIB)
    tokenizer: Any = SimpleNamespace(eos_ids=frozenset())
    params = Parameters(made_up.weights, made_up.vectors, made_up.ropes, params.layers)
    return Engine(LoadedModel(spec, params, tokenizer, plan, "native"), replace(config, num_blocks=plan.num_blocks))


def _array(leaf: Any, memory: np.ndarray) -> jax.Array:
    if leaf.dtype == np.uint8:
        num_bytes = leaf.shape[0] * leaf.shape[1]
        return jax.device_put(memory[:num_bytes].reshape(leaf.shape))
    return jax.device_put(np.full(leaf.shape, 0.5, leaf.dtype))


def _add(engine: Engine, name: str, prompt_len: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request(name, tuple(range(1, prompt_len + 1)), params))
