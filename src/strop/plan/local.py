"""A copy of a model on this machine's processor, its passes at the times that were measured here."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from strop.core.config import EngineConfig
from strop.core.errors import UnsupportedError
from strop.engine.costs import CostModel
from strop.engine.loading import no_kernels
from strop.formats.checkpoint import AnyCheckpoint
from strop.machine.catalog import THIS, Device, Machines
from strop.machine.memory import available_bytes
from strop.machine.profile import MachineProfile
from strop.models.abstract import abstract_parameters, parameter_bytes
from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.load import load_abstract
from strop.models.memory import activation_bytes, runtime_bytes
from strop.models.mesh import AttentionSharding, MeshShape
from strop.models.parameters import Parameters
from strop.models.reader import ParameterReader
from strop.models.spec import ModelSpec
from strop.ops.attention import AttentionCall
from strop.ops.cost import KV_BYTES
from strop.ops.embed import EmbedCall
from strop.ops.experts import ExpertsCall
from strop.ops.linear import LinearCall
from strop.plan.latency import Pass
from strop.plan.passes import CardRow, Network, PassTime
from strop.plan.predict import Predictor, Span, StepTime

NATIVE_FORMATS = {"bf16": "bf16", "int8": "q8"}
"""Of weights that are in no file yet, by the planner's names."""


def this_hardware(profile: MachineProfile) -> Machines:
    """This machine as hardware: what was measured, and the memory that is free now. Its peak is the fastest product."""
    peak = max(
        2 * sized.num_weights * rows / seconds
        for sizes in profile.linear.values()
        for sized in sizes
        for rows, seconds in zip(sized.cold.x, sized.cold.y, strict=True)
    )
    device = Device(
        name=THIS,
        title=f"{profile.machine.cpu}, {profile.machine.num_threads} threads",
        aliases=(),
        peak_flops_per_s={"bf16": peak},
        memory_bytes=available_bytes(),
        memory_bytes_per_s=profile.read_bytes_per_s.y[-1],
        topology="none",
        link_bytes_per_s=0.0,
        num_torus_axes=0,
        ring_axis_multiple=1,
        max_devices=1,
        usd_per_device_hour=None,
        price_date="",
        sources={},
    )
    return Machines(device, 1)


class Local:
    """One copy, by strop.plan.predict and the engine's own memory plan."""

    mesh = MeshShape()
    num_devices = 1

    def __init__(
        self, spec: ModelSpec, params: Parameters, profile: MachineProfile, config: EngineConfig, machines: Machines
    ) -> None:
        """`params` may be abstract, on the platform `native`; `config` says how the cache stores numbers."""
        self.network, self.device = Network(spec, 1), machines.device
        self._params, self._config = params, config
        layout = Single("native", config.block_len, config.kv_dtype)
        self._predictor = Predictor(profile, CostModel(params, spec, layout))
        self._step_time = cache(self._predict)

    @cached_property
    def weight_dtype(self) -> str:
        """The format of most of the weights."""
        sizes: Counter[str] = Counter()
        for weight in self._params.weights.values():
            for part in weight.parts:
                sizes[part.format] += math.prod(part.data.shape)
        return sizes.most_common(1)[0][0]

    @cached_property
    def weight_bytes(self) -> float:
        """Packed."""
        return parameter_bytes(self._params)

    @cached_property
    def cache_bytes_per_token(self) -> dict[AttentionSharding, float]:
        """All on the one device. Layers with a window count as if they had none."""
        each = sum(group.bytes_per_token(*KV_BYTES[self._config.kv_dtype]) for group in cache_groups(self.network.spec))
        return {"heads": each, "batch": each}

    @property
    def usable_bytes(self) -> float:
        """What is free now, or the config's limit, without what the runtime takes."""
        return (self._config.memory_bytes or self.device.memory_bytes) - runtime_bytes(self.network.spec, "native")

    def activation_bytes(self, rows: int, batch: int) -> float:
        """As the engine plans them."""
        config = replace(self._config, max_step_tokens=rows, max_num_seqs=batch)
        return activation_bytes(self.network.spec, config, "native")

    def pass_time(self, step: Pass) -> PassTime:
        """By the figures of the profile."""
        return PassTime(self._step_time(step).seconds, None)

    def parts(self, step: Pass, time: PassTime) -> dict[str, float]:
        """Seconds by what they wait for."""
        found: dict[str, float] = dict.fromkeys(("compute", "weights", "cache", "links", "overhead"), 0.0)
        return found | self._step_time(step).binding

    def card_rows(self, step: Pass, time: PassTime) -> list[CardRow]:
        """Like operations together."""
        found: dict[tuple[str, str], CardRow] = {}
        for op in self._step_time(step).ops:
            key = describe(op.call), op.binds
            before = found.get(key, CardRow(key[0], 0, 0.0, 0.0, 0.0, 0.0, op.binds))
            found[key] = CardRow(
                name=key[0],
                count=before.count + op.times,
                flops=before.flops + op.times * op.cost.flops,
                memory_bytes=before.memory_bytes + op.times * (op.cost.bytes_read + op.cost.bytes_written),
                sent_bytes=0.0,
                seconds=before.seconds + op.seconds,
                binds=op.binds,
            )
        return list(found.values())

    def _predict(self, step: Pass) -> StepTime:
        spans = [Span(step.context_len - step.new_tokens, step.new_tokens)] * step.batch
        return self._predictor.step(spans, step.batch)


def describe(call: Any) -> str:
    """An operation in a few words; what is no kernel is called by its own name."""
    match call:
        case LinearCall():
            return f"product {call.k_len} x {call.n_len} {call.format}"
        case AttentionCall():
            window = "" if call.window_len is None else f", window {call.window_len}"
            return f"attention {call.num_heads} x {call.head_dim}{window}"
        case ExpertsCall():
            return f"experts {call.num_active} of {call.num_experts}"
        case EmbedCall():
            return "embedding"
        case str():
            return call
    return type(call).op if hasattr(type(call), "op") else type(call).__name__


def published_copy(
    spec: ModelSpec, dtype: str, profile: MachineProfile, config: EngineConfig, machines: Machines
) -> Local:
    """A network without a file, all its weights of one type. Raises UnsupportedError for what the kernels do not do."""
    check_kernels(spec, config)
    params = abstract_parameters(spec, lambda path: NATIVE_FORMATS[dtype], "native", num_positions=1)
    return Local(spec, params, profile, config, machines)


def stored_copy(
    checkpoint: AnyCheckpoint, spec: ModelSpec, profile: MachineProfile, config: EngineConfig, machines: Machines
) -> Local:
    """A model as its file stores it, and the engine would pack it. Raises UnsupportedError as `published_copy`."""
    check_kernels(spec, config)
    params = load_abstract(ParameterReader(checkpoint, spec), spec, "native", num_positions=1)
    return Local(spec, params, profile, config, machines)


def check_kernels(spec: ModelSpec, config: EngineConfig) -> None:
    """Raises UnsupportedError where an engine would run without the native kernels, which is what was measured."""
    if reason := no_kernels(spec, config):
        raise UnsupportedError(
            f"this machine is measured by its native kernels, which do not run this model here ({reason}): plan for "
            "hardware of the catalog"
        )
