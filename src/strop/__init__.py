"""Strop hones a language model to the machine it runs on.

Public names load on first use, so that `import strop` never drags in jax.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "strop.llm",
    "AsyncEngine": "strop.engine.async_engine",
    "SamplingParams": "strop.core.request",
    "StructuredOutputsParams": "strop.core.request",
    "CompletionOutput": "strop.core.request",
    "RequestOutput": "strop.core.request",
    "EmbeddingRequestOutput": "strop.core.request",
    "EngineConfig": "strop.core.config",
    "Processes": "strop.core.config",
    "StropError": "strop.core.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'strop' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted(__all__)
