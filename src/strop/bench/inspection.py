"""What can be said of a model file without loading it: what `strop inspect` prints."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from strop.bench.workloads import ANSWER_TOKENS, PROMPT_TOKENS, Workload
from strop.core.config import GIB, EngineConfig
from strop.core.errors import CapacityError, RequestError, StropError
from strop.engine.loading import (
    LoadedModel,
    choose_platform,
    keep_compiled_steps,
    load_tokenizer,
    plan_memory_here,
    resolve,
)
from strop.formats.artifact import ArtifactCheckpoint
from strop.formats.checkpoint import AnyCheckpoint, open_checkpoint
from strop.formats.gguf import GGUFCheckpoint, set_name, survey
from strop.formats.hf import read_json
from strop.formats.tokenizer import Tokenizer
from strop.formats.values import TensorInfo
from strop.machine.memory import available_bytes
from strop.machine.probe import MachineRates
from strop.models.memory import MemoryPlan
from strop.models.reader import ParameterReader, load_spec, spec_to_json
from strop.models.spec import ModelSpec

_MAX_FACTS = 40
_MAX_FACT_LEN = 120
_PREFILL_TOKENS = 512
_PROBE_S = 1.5
_MEASURED_CONTEXT_LEN = 640
"""Room for either workload of `_measured_speed`."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """All tensors of one format."""

    format: str
    num_tensors: int
    num_values: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """Of one sequence that sees `context_tokens`."""

    context_tokens: int
    tokens_per_s: float
    step_bytes: int
    """Weights and cache that a step reads and writes."""


@dataclass(frozen=True, slots=True)
class SpeedLimit:
    """The most this machine can do for one sequence; nothing reaches it."""

    decode: tuple[DecodeLimit, ...]
    """Near the beginning of a chat, and at the end of the context."""
    prefill_tokens: int
    prefill_tokens_per_s: float | None
    """None without the native library, which measures the processor's rates."""
    read_bytes_per_s: float
    num_threads: int
    rates: MachineRates | None


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """What the engine did for one sequence, on weights of zeros."""

    decode_tokens_per_s: float
    """Of the tokens 129 to 256."""
    prefill_tokens: int
    prefill_tokens_per_s: float


@dataclass(slots=True)
class Inspection:
    """Whatever could be found; a stage that failed left its reason in `problems`."""

    model: str
    kind: str = "unknown"
    num_file_bytes: int = 0
    facts: dict[str, str | int | float] = field(default_factory=dict)
    """The file's own words: general keys of a GGUF, plain keys of a config.json."""
    formats: list[TensorGroup] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    spec: ModelSpec | None = None
    tokenizer: str = ""
    chat_template: str = ""
    platform: str = ""
    no_kernels: str | None = None
    """Why the native kernels cannot serve it here."""
    memory: MemoryPlan | None = None
    speed_limit: SpeedLimit | None = None
    measured_speed: MeasuredSpeed | None = None
    problems: list[StropError] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in ("model", "kind", "num_file_bytes", "facts")},
            "formats": [asdict(group) for group in self.formats],
            "tensors": [asdict(info) for info in self.tensors],
            "spec": None if self.spec is None else spec_to_json(self.spec),
            **{name: getattr(self, name) for name in ("tokenizer", "chat_template", "platform", "no_kernels")},
            "memory": None if memory is None else asdict(memory) | {"total_bytes": memory.total_bytes},
            "speed_limit": None if self.speed_limit is None else asdict(self.speed_limit),
            "measured_speed": None if self.measured_speed is None else asdict(self.measured_speed),
            "problems": [str(problem) for problem in self.problems],
        }


def inspect(model: str, config: EngineConfig, *, with_speed: bool = True, measure: bool = False) -> Inspection:
    """Looks at a model as far as it can be understood; a file's faults are among the problems.

    Args:
        config: what the memory is planned for.
        with_speed: probe the machine, for about 2 s.
        measure: run the engine on weights of zeros, which takes the model's memory for some seconds.

    Raises:
        RequestError: `config` is out of range, or asks for a longer context than the model has.
    """
    found = Inspection(model)
    try:
        checkpoint = open_checkpoint(model)
    except StropError as error:
        found.problems.append(error)
        _look_at_refused(found, Path(model).expanduser())
        return found
    paths = checkpoint.paths if isinstance(checkpoint, GGUFCheckpoint) else _files(checkpoint.path)
    found.kind = _kind(checkpoint)
    found.num_file_bytes = sum(path.stat().st_size for path in paths)
    found.facts = facts(_metadata(checkpoint))
    found.tensors = list(checkpoint.tensors.values())
    found.formats = tensor_groups(found.tensors)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(checkpoint)
        found.tokenizer, found.chat_template = describe_tokenizer(tokenizer), _template(tokenizer)
    except StropError as error:
        found.problems.append(error)
    try:
        found.spec = load_spec(checkpoint)
        reader = ParameterReader(checkpoint, found.spec)
        if tokenizer is not None:
            tokenizer.fit_embedding(found.spec.vocab_size)
        _plan(found, _Candidate(reader, found.spec, tokenizer, resolve(config, found.spec)), with_speed, measure)
    except RequestError:
        raise
    except StropError as error:
        found.problems.append(error)
    return found


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model that could be loaded."""

    reader: ParameterReader
    spec: ModelSpec
    tokenizer: Tokenizer | None
    config: EngineConfig


def _plan(found: Inspection, model: _Candidate, with_speed: bool, measure: bool) -> None:
    from strop.models.load import load_abstract  # and with it jax, which only a model that can run is worth

    platform, no_kernels = choose_platform(model.spec, model.config)
    with suppress(CapacityError):  # a model that does not fit has a speed all the same
        found.memory = plan_memory_here(model.reader, model.spec, model.config, platform)
    params = load_abstract(model.reader, model.spec, platform, num_positions=model.config.max_context_len)
    found.platform, found.no_kernels = platform, no_kernels
    on_accelerator = platform == "xla" and no_kernels is None  # whose memory the probe does not reach
    if with_speed and model.spec.causal and not on_accelerator:
        found.speed_limit = speed_limit(params, model.spec, platform, model.config)
    if found.memory is None:
        plan_memory_here(model.reader, model.spec, model.config, platform)  # raises
    if measure and model.spec.causal and model.tokenizer is not None:
        found.measured_speed = _measured_speed(model, model.tokenizer, platform, params)


def speed_limit(params: Any, spec: ModelSpec, platform: Any, config: EngineConfig) -> SpeedLimit:
    """Counts a step's costs on shapes alone (`params` as `load_abstract` returns them), and probes the machine."""
    from strop.engine.costs import CostModel, StepCost
    from strop.machine.probe import probe, read_bandwidth_bytes_per_s
    from strop.models.layout import Single
    from strop.ops import native

    costs = CostModel(params, spec, Single(platform, config.block_len))
    context_lens = sorted({min(PROMPT_TOKENS + ANSWER_TOKENS // 2, config.max_context_len), config.max_context_len})
    steps = [costs.decode_step(1, context_len) for context_len in context_lens]
    # Past the caches all sizes read alike, and a model that does not fit must not be probed in full.
    working_set_bytes = max(1, min(steps[0].num_bytes, GIB, available_bytes() // 4))
    prefill_tokens = min(_PREFILL_TOKENS, config.max_context_len)
    library = native.library() if platform == "native" else None
    if library is None:
        rates, bandwidth = None, read_bandwidth_bytes_per_s(working_set_bytes, config.num_threads)
    else:
        rates = probe(library, working_set_bytes, config.num_threads, _PROBE_S)
        bandwidth = rates.best_read_bytes_per_s

    def least_s(step: StepCost) -> float:
        return step.num_bytes / bandwidth if rates is None else step.limit_s(rates)

    return SpeedLimit(
        decode=tuple(
            DecodeLimit(context_len, 1 / least_s(step), step.num_bytes)
            for context_len, step in zip(context_lens, steps, strict=True)
        ),
        prefill_tokens=prefill_tokens,
        prefill_tokens_per_s=None if rates is None else prefill_tokens / least_s(costs.prefill(1, prefill_tokens)),
        read_bytes_per_s=bandwidth,
        num_threads=config.num_threads,
        rates=rates,
    )


def _measured_speed(model: _Candidate, tokenizer: Tokenizer, platform: Any, abstract: Any) -> MeasuredSpeed:
    """Runs the engine on weights of zeros: a step takes as long whatever the weights are.

    Raises:
        CapacityError: the model does not fit.
        RequestError: its context is too short for the workloads.
    """
    import jax
    import jax.numpy as jnp

    from strop.bench.measure import Ours
    from strop.engine.engine import Engine
    from strop.ops import native

    if model.config.max_context_len < _MEASURED_CONTEXT_LEN:
        raise RequestError(
            f"max_context_len={model.config.max_context_len} is too short to measure the speed, which takes"
            f" {_MEASURED_CONTEXT_LEN} tokens: leave out --measure"
        )
    config = replace(model.config, max_num_seqs=1, max_context_len=_MEASURED_CONTEXT_LEN)
    memory = plan_memory_here(model.reader, model.spec, config, platform)
    config = replace(config, num_blocks=memory.num_blocks, memory_bytes=memory.limit_bytes)

    keep_compiled_steps()
    native.set_num_threads(config.num_threads)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    engine = Engine(LoadedModel(model.spec, params, tokenizer, memory, platform), config)
    ours = Ours(engine, "", config.num_threads)
    decode, prefill = (
        max(ours.measure(workload) for _ in range(2))  # the first time also compiles
        for workload in (Workload("decode", 1), Workload("prefill", _PREFILL_TOKENS))
    )
    return MeasuredSpeed(decode, _PREFILL_TOKENS, prefill)


def _look_at_refused(found: Inspection, path: Path) -> None:
    """What a model that cannot be opened still tells."""
    with suppress(StropError, OSError):
        found.num_file_bytes = sum(file.stat().st_size for file in _files(path))
        if (path / "config.json").is_file():
            found.kind, found.facts = "model folder", facts(read_json(path / "config.json"))
            return
        files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
        for file in files if len({set_name(file) for file in files}) == 1 else []:
            metadata, tensors = survey(file)
            found.kind = "GGUF file"
            found.facts = found.facts or facts(metadata)
            found.tensors += tensors.values()
    found.formats = tensor_groups(found.tensors)


def _files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def _kind(checkpoint: AnyCheckpoint) -> str:
    if isinstance(checkpoint, GGUFCheckpoint):
        num_parts = len(checkpoint.paths)
        return "GGUF file" if num_parts == 1 else f"GGUF in {num_parts} parts"
    return "artifact" if isinstance(checkpoint, ArtifactCheckpoint) else "Hugging Face folder"


def _metadata(checkpoint: AnyCheckpoint) -> dict[str, Any]:
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.metadata
    if isinstance(checkpoint, ArtifactCheckpoint):
        parts = {"provenance": checkpoint.provenance, "receipt": checkpoint.receipt}
        return {f"{part}.{key}": value for part, entries in parts.items() for key, value in (entries or {}).items()}
    return checkpoint.config


def facts(metadata: dict[str, Any]) -> dict[str, str | int | float]:
    """The plain values of a file's metadata, long texts shortened; no lists, and nothing of the tokenizer."""
    plain = {
        _shortened(key): _shortened(value) if isinstance(value, str) else value
        for key, value in metadata.items()
        if isinstance(value, str | int | float) and not key.startswith(("tokenizer.", "split."))
    }
    # NaN and infinity are not JSON.
    finite = {key: value if isinstance(value, str) or isfinite(value) else str(value) for key, value in plain.items()}
    return dict(list(finite.items())[:_MAX_FACTS])


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_FACT_LEN else text[: _MAX_FACT_LEN - 3] + "..."


def tensor_groups(tensors: Iterable[TensorInfo]) -> list[TensorGroup]:
    """Counted by format, the largest first."""
    num_tensors, num_values, num_bytes = Counter[str](), Counter[str](), Counter[str]()
    for info in tensors:
        num_tensors[info.format] += 1
        num_values[info.format] += prod(info.shape)
        num_bytes[info.format] += info.num_bytes
    return [
        TensorGroup(name, num_tensors[name], num_values[name], num_bytes[name]) for name, _ in num_bytes.most_common()
    ]


def total(groups: Iterable[TensorGroup]) -> TensorGroup:
    """All groups together, as one called "all"."""
    counts = [(group.num_tensors, group.num_values, group.num_bytes) for group in groups]
    return TensorGroup("all", *map(sum, zip(*counts, strict=True)))


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """One line."""
    ends = [f"{tokenizer.token_bytes(token_id).decode('utf-8', 'replace')!r}" for token_id in sorted(tokenizer.eos_ids)]
    begins = "adds no token before a text" if not tokenizer.encode("") else f"frames a text with {tokenizer.encode('')}"
    return (
        f"{tokenizer.vocab_size:,} tokens, {len(tokenizer.special_ids)} of them special, {begins}, ends at "
        f"{', '.join(ends) or 'no token'}"
    )


def _template(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if template is None:
        return ""
    uses = [name for name in ("tools", "system") if name in template]
    return f"{len(template):,} characters" + (f", mentions {' and '.join(uses)}" if uses else "")
