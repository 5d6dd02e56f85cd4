"""What a family of models is: how its configs are read, and how its checkpoints name their tensors."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from strop.models.config import Config
from strop.models.names import NameMap
from strop.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Gguf:
    """A family's GGUF files."""

    architecture: str
    names: NameMap
    config: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp takes for keys that the file does not give."""
    derived: Callable[[Config, Container[str]], Mapping[str, Any]] = lambda config, tensors: {}
    """Keys that follow from others and from the names of the tensors, whatever the file says of them."""
    with_experts: bool = False
    """Two families may share an architecture: the one with experts and the one without."""
    yarn_truncates: bool = True
    """Whether yarn rounds the ends of its ramp, which files do not say."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family. `spec` looks at every key it can honour; the rest are refused by name."""

    model_type: str
    architectures: tuple[str, ...]
    """As `config.json` names them."""
    spec: Callable[[Config], ModelSpec]
    """The network a config describes."""
    names: NameMap
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that are absent, where it is not what `Config` takes."""
    config_names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """What this family's configs call a key that most call otherwise."""
    ignored: str = ""
    """Keys of its configs, spaces between, that do not change what the network computes."""
    gguf: Gguf | None = None
