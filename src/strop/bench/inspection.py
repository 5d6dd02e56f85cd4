"""What can be said of a model file without loading it: what `strop inspect` prints."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, StropError
from strop.engine.loading import load_tokenizer, resolve
from strop.formats.artifact import ArtifactCheckpoint
from strop.formats.checkpoint import AnyCheckpoint, open_checkpoint
from strop.formats.gguf import GGUFCheckpoint, read_metadata
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


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """All tensors of one format."""

    format: str
    num_tensors: int
    num_values: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SpeedLimit:
    """The most this machine can do at batch 1, in tokens per second; nothing reaches it."""

    platform: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float | None
    """None without the native library, which measures the processor's rates."""
    prefill_tokens: int
    decode_step_bytes: int
    read_bytes_per_s: float
    rates: MachineRates | None


@dataclass(slots=True)
class Inspection:
    """Whatever could be found; a stage that failed left its reason in `problems`."""

    model: str
    kind: str = "unknown"
    num_file_bytes: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    """The file's own words: general keys of a GGUF, plain keys of a config.json."""
    tensors: list[TensorGroup] = field(default_factory=list)
    spec: ModelSpec | None = None
    tokenizer: str = ""
    chat_template: str = ""
    memory: MemoryPlan | None = None
    speed: SpeedLimit | None = None
    problems: list[StropError] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self, name) for name in ("model", "kind", "num_file_bytes", "facts")}
        return plain | {
            "tensors": [asdict(group) for group in self.tensors],
            "spec": None if self.spec is None else spec_to_json(self.spec),
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "memory": None if self.memory is None else asdict(self.memory) | {"total_bytes": self.memory.total_bytes},
            "speed_limit": None if self.speed is None else asdict(self.speed),
            "problems": [str(problem) for problem in self.problems],
        }


def inspect(model: str, config: EngineConfig, *, with_speed: bool = True) -> Inspection:
    """Looks at a model as far as it can be understood; a file's faults are among the problems.

    Args:
        config: what the memory is planned for.
        with_speed: probe the machine, for about 2 s.

    Raises:
        RequestError: `config` is out of range, or asks for a longer context than the model has.
    """
    found = Inspection(model)
    try:
        checkpoint = open_checkpoint(model)
    except StropError as error:
        found.problems.append(error)
        _look_at_damaged(found, Path(model).expanduser())
        return found
    found.kind = _kind(checkpoint)
    found.num_file_bytes = sum(path.stat().st_size for path in _files(checkpoint.path))
    found.facts = facts(_metadata(checkpoint))
    found.tensors = tensor_groups(checkpoint.tensors.values())
    tokenizer = None
    try:
        tokenizer = load_tokenizer(checkpoint)
        found.tokenizer, found.chat_template = describe_tokenizer(tokenizer), _template(tokenizer)
    except StropError as error:
        found.problems.append(error)
    try:
        found.spec = load_spec(checkpoint)
        reader = ParameterReader(checkpoint, found.spec)
        _plan(found, reader, found.spec, resolve(config, found.spec), with_speed)
    except RequestError:
        raise
    except StropError as error:
        found.problems.append(error)
    return found


def _plan(found: Inspection, reader: ParameterReader, spec: ModelSpec, config: EngineConfig, with_speed: bool) -> None:
    from strop.engine.loading import why_no_kernels  # and with it jax, which only a model that can run is worth
    from strop.models.memory import plan_memory
    from strop.ops.dispatch import Platform

    platform: Platform = "native" if why_no_kernels(spec, config) is None else "xla"
    try:
        found.memory = plan_memory(reader, spec, config, platform, available_bytes=available_bytes())
    finally:  # a model that does not fit has a speed all the same
        if with_speed:
            found.speed = speed_limit(reader, spec, platform, config)


def speed_limit(reader: ParameterReader, spec: ModelSpec, platform: Any, config: EngineConfig) -> SpeedLimit:
    """Counts a step's costs on shapes alone, and probes the machine's rates."""
    from strop.bench.limits import CostModel
    from strop.bench.workloads import Workload
    from strop.machine.probe import probe, read_bandwidth_bytes_per_s
    from strop.models.layout import Single
    from strop.models.load import load_abstract
    from strop.ops import native

    params = load_abstract(reader, spec, platform, num_positions=config.max_context_len)
    costs = CostModel(params, spec, Single(platform, config.block_len))
    step_bytes = costs.decode_step(1, min(192, config.max_context_len)).num_bytes
    prefill_tokens = min(_PREFILL_TOKENS, config.max_context_len)
    library = native.library() if platform == "native" else None
    if library is None:
        bandwidth = read_bandwidth_bytes_per_s(step_bytes, config.num_threads)
        return SpeedLimit(platform, bandwidth / step_bytes, None, prefill_tokens, step_bytes, bandwidth, None)
    rates = probe(library, step_bytes, config.num_threads, _PROBE_S)
    decode, prefill = (
        costs.best_value(Workload(*work), rates) for work in (("decode", 1), ("prefill", prefill_tokens))
    )
    assert decode is not None
    return SpeedLimit(platform, decode, prefill, prefill_tokens, step_bytes, rates.best_read_bytes_per_s, rates)


def _look_at_damaged(found: Inspection, path: Path) -> None:
    """What a model that cannot be opened still tells."""
    try:
        found.num_file_bytes = sum(file.stat().st_size for file in _files(path))
        if (path / "config.json").is_file():
            found.kind, found.facts = "model folder", facts(read_json(path / "config.json"))
        elif path.is_file():
            found.facts = facts(read_metadata(path))
            found.kind = "GGUF file"
    except (StropError, OSError):
        return


def _files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def _kind(checkpoint: AnyCheckpoint) -> str:
    if isinstance(checkpoint, GGUFCheckpoint):
        return "GGUF file"
    return "artifact" if isinstance(checkpoint, ArtifactCheckpoint) else "Hugging Face folder"


def _metadata(checkpoint: AnyCheckpoint) -> dict[str, Any]:
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.metadata
    return {} if isinstance(checkpoint, ArtifactCheckpoint) else checkpoint.config


def facts(metadata: dict[str, Any]) -> dict[str, str]:
    """The plain values of a file's metadata, shortened; no lists, and nothing of the tokenizer."""
    plain = {
        key: value
        for key, value in metadata.items()
        if isinstance(value, str | int | float) and not key.startswith(("tokenizer.", "split."))
    }
    some = list(plain.items())[:_MAX_FACTS]
    return {_one_line(key): _one_line(str(value)) for key, value in some}


def _one_line(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: _MAX_FACT_LEN + 1])
    return shown if len(shown) <= _MAX_FACT_LEN else shown[: _MAX_FACT_LEN - 3] + "..."


def tensor_groups(tensors: Iterable[TensorInfo]) -> list[TensorGroup]:
    """Counted by format, the largest first."""
    num_tensors, num_values, num_bytes = Counter[str](), Counter[str](), Counter[str]()
    for info in tensors:
        values = 1
        for length in info.shape:
            values *= length
        num_tensors[info.format] += 1
        num_values[info.format] += values
        num_bytes[info.format] += info.num_bytes
    return [
        TensorGroup(name, num_tensors[name], num_values[name], num_bytes[name]) for name, _ in num_bytes.most_common()
    ]


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """One line."""
    ends = [f"{tokenizer.token_bytes(token_id).decode('utf-8', 'replace')!r}" for token_id in sorted(tokenizer.eos_ids)]
    begins = "adds no token before a text" if not tokenizer.encode("") else f"frames a text with {tokenizer.encode('')}"
    return (
        f"{tokenizer.vocab_size:,} tokens, {len(tokenizer.special_ids)} of them special, {begins}, ends at "
        f"{', '.join(map(_one_line, ends)) or 'no token'}"
    )


def _template(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if template is None:
        return ""
    uses = [name for name in ("tools", "system") if name in template]
    return f"{len(template):,} characters" + (f", mentions {' and '.join(uses)}" if uses else "")
