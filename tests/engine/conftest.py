"""Tiny models, engines over them, and a driver that lets requests crowd each other."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import pytest
from tiny_llm import tiny_llm

from strop.core.config import EngineConfig
from strop.core.request import Request, TokenEvent
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel, load_model
from strop.engine.step import CompiledModel
from strop.ops import native

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SMALL = EngineConfig(max_num_seqs=4, max_step_tokens=64, max_context_len=128, num_blocks=6, num_threads=2)
"""One size for all tests, so that each step is compiled once: 5 pages of 32 tokens, a third of what 4 can want."""


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STROP_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_path(family, weights, tied=...): a GGUF file."""
    made: dict[object, Path] = {}

    def make(family: str = "llama", weights: str = "Q4_1", *, tied: bool = True) -> Path:
        key = (family, weights, tied)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model") / f"{family}-{weights}.gguf"
            made[key].write_bytes(tiny_llm(family, weights, tied=tied).build())
        return made[key]

    return make


@pytest.fixture(scope="session")
def loaded(tiny_path: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """loaded(family, weights, tied=...): the model, loaded once, for the native kernels."""
    made: dict[object, LoadedModel] = {}

    def load(family: str = "llama", weights: str = "Q4_1", *, tied: bool = True) -> LoadedModel:
        if not native.register():
            pytest.skip("the native library is not built")
        key = (family, weights, tied)
        if key not in made:
            made[key], _ = load_model(str(tiny_path(family, weights, tied=tied)), SMALL)
            assert made[key].platform == "native"
        return made[key]

    return load


@pytest.fixture(scope="session")
def new_engine(loaded: Callable[..., LoadedModel]) -> Callable[..., Engine]:
    """new_engine(model=None, **settings): a fresh engine with SMALL's sizes, unless told otherwise."""
    compiled: dict[object, tuple[CompiledModel, object]] = {}  # with what the key's id belongs to

    def make(model: LoadedModel | None = None, **settings: object) -> Engine:
        engine = Engine(model or loaded(), replace(SMALL, **settings))
        # What is compiled for a model serves all engines over it.
        key = (id(engine.params), engine.spec, engine.layout)
        engine._compiled, _ = compiled.setdefault(key, (engine._compiled, engine.params))
        return engine

    return make


@dataclass
class Answer:
    """What one choice got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)
    prompt_logprobs: list[object] = field(default_factory=list)
    finish: tuple[object, object] | None = None
    fault: object = None

    def take(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the end"
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        if event.finish_reason is not None:
            self.finish, self.fault = (event.finish_reason, event.stop_reason), event.fault


Answers = dict[tuple[str, int], Answer]


def run_alone(make: Callable[[], Engine], requests: list[Request]) -> Answers:
    """Each request on an engine of its own."""
    answers: Answers = {}
    for request in requests:
        answers |= run_crowd(make(), [request])
    return answers


def run_crowd(
    engine: Engine, requests: list[Request], *, seed: int | None = None, doomed: frozenset[str] = frozenset()
) -> Answers:
    """All requests on one engine: at random moments with a seed, else at once. `doomed` ones are aborted on the way."""
    rng = random.Random(seed)
    waiting, late = list(reversed(requests)), seed is not None
    answers = {(request.request_id, i): Answer() for request in requests for i in range(request.params.n)}
    present: list[str] = []
    while waiting or engine.has_unfinished:
        while waiting and (not late or not engine.has_unfinished or rng.random() < 0.4):
            request = waiting.pop()
            engine.add(request)
            present.append(request.request_id)
        for event in engine.step():
            answers[event.request_id, event.index].take(event)
        engine.scheduler.check()
        for request_id in doomed.intersection(present):
            if rng.random() < 0.2:
                engine.abort(request_id)
                present.remove(request_id)
    assert all(pool.num_free == pool.num_usable for pool in engine.scheduler.groups.pools)
    return {key: answer for key, answer in answers.items() if key[0] not in doomed}


@pytest.fixture
def alone() -> Callable[..., Answers]:
    return run_alone


@pytest.fixture
def crowd() -> Callable[..., Answers]:
    return run_crowd
