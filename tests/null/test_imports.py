"""What starting costs: `strop --help` and `import strop` load nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = {"jax", "jaxlib", "numpy"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []], ids=" ".join)
def test_help_loads_neither_jax_nor_numpy(arguments: list[str]) -> None:
    loaded = loaded_after(f"import sys; sys.argv = {['strop', *arguments]}\nfrom strop.cli.main import main; main()")
    assert "strop" in loaded
    assert not loaded & (HEAVY | {"click", "rich"})


def test_the_public_names_load_on_first_use() -> None:
    assert not loaded_after("import strop; strop.__version__; dir(strop)") & HEAVY
    assert not loaded_after("from strop import SamplingParams, EngineConfig, StropError; SamplingParams()") & HEAVY
    assert "jax" in loaded_after("import strop; strop.LLM")


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import strop

    with pytest.raises(AttributeError, match="public names: LLM"):
        strop.Llm  # noqa: B018
