"""A model over several processes: the first says what it calls its model with, and the others do the same."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from strop.core.config import EngineConfig
from strop.core.errors import EngineDownError, RequestError
from strop.engine.channel import Call, CopyBlock, HostArray, NewCaches, Score, Step
from strop.engine.group import Followers, Leader
from strop.engine.loading import LoadedModel, load_model
from strop.engine.pack import StepShape
from strop.engine.step import Caches, CompiledModel
from strop.models.layout import Single
from strop.models.memory import MemoryPlan
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.spec import ModelSpec
from strop.ops.sample import SampleInputs

P = ParamSpec("P")
R = TypeVar("R")


class LeadingModel(CompiledModel):
    """The model in the first process. What fails here or there ends the engine with an EngineDownError."""

    def __init__(
        self,
        followers: Followers,
        params: Parameters,
        spec: ModelSpec,
        layout: Single | Partition,
        *,
        may_change_layout: bool,
    ) -> None:
        super().__init__(params, spec, layout, may_change_layout=may_change_layout)
        self._followers = followers

    def new_caches(self, num_blocks: Sequence[int]) -> Caches:
        """See CompiledModel."""
        self._followers.tell(NewCaches(list(num_blocks)))
        return super().new_caches(num_blocks)

    def step(
        self, caches: Caches, ints: np.ndarray, inputs: SampleInputs | None, shape: StepShape, num_top: int
    ) -> tuple[Any, Caches]:
        """See CompiledModel."""
        self._followers.tell(Step(shape, _sent(ints), [_sent(part) for part in inputs or ()], num_top))
        return self._finished(super().step, caches, ints, inputs, shape, num_top)

    def logits(self, caches: Caches, ints: np.ndarray, shape: StepShape) -> tuple[jax.Array, Caches]:
        """See CompiledModel."""
        self._followers.tell(Score(shape, _sent(ints)))
        return self._finished(super().logits, caches, ints, shape)

    def copy_block(self, caches: Caches, group: int, source: int, destination: int) -> Caches:
        """See CompiledModel."""
        self._followers.tell(CopyBlock(group, source, destination))
        return super().copy_block(caches, group, source, destination)

    def _finished(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the call computes, when it has been."""
        try:
            return jax.block_until_ready(call(*args, **kwargs))
        except Exception as error:
            raise self._followers.step_failed(error) from error


def compiled_model(model: LoadedModel, layout: Single | Partition, config: EngineConfig) -> CompiledModel:
    """The steps of a model, over all of its processes. RequestError in a process that follows another."""
    may_change = config.layout == "auto"
    if isinstance(model.group, Leader):
        raise RequestError("this process follows process 0, which takes the requests: call strop.engine.lead.follow")
    if isinstance(model.group, Followers):
        return LeadingModel(model.group, model.params, model.spec, layout, may_change_layout=may_change)
    return CompiledModel(model.params, model.spec, layout, may_change_layout=may_change)


def follow(model: str, config: EngineConfig, on_plan: Callable[[MemoryPlan], None] | None = None) -> None:
    """Does in this process what the first of `config.processes` does, until that ends.

    Args:
        model: the same as the first process's, wherever it lies here.
        config: of which `processes` and the limits of memory and threads count; the rest is the first process's.

    Raises:
        EngineDownError: the first process did not come, or was lost.
    """
    own = EngineConfig(processes=config.processes, memory_bytes=config.memory_bytes, num_threads=config.num_threads)
    loaded, config = load_model(model, own, on_plan)
    assert isinstance(loaded.group, Leader) and loaded.layout is not None, "process 0 leads"
    compiled = CompiledModel(loaded.params, loaded.spec, loaded.layout, may_change_layout=config.layout == "auto")
    caches: Caches = ()
    for call in loaded.group.calls():
        try:
            caches = jax.block_until_ready(_obeyed(compiled, caches, call))
        except Exception as error:
            raise EngineDownError(f"a step failed in this process: {error}; start all processes again") from error


def _obeyed(compiled: CompiledModel, caches: Caches, call: Call) -> Caches:
    """The caches after the call."""
    match call:
        case NewCaches(num_blocks):
            for cache in caches:
                cache.delete()  # two would not fit
            return compiled.new_caches(num_blocks)
        case Step(shape, ints, inputs, num_top):
            given = SampleInputs(*map(_received, inputs)) if inputs else None
            return compiled.step(caches, _received(ints), given, shape, num_top)[1]
        case Score(shape, ints):
            return compiled.logits(caches, _received(ints), shape)[1]
        case CopyBlock(group, source, destination):
            return compiled.copy_block(caches, group, source, destination)
    raise AssertionError(call)


def _sent(array: np.ndarray) -> HostArray:
    return HostArray(array.dtype.str, array.shape, array.tobytes())


def _received(array: HostArray) -> np.ndarray:
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)
