"""Chat templates of real models render as in transformers. They keep their models' terms, so only hashes are stored.

Set STROP_CHAT_TEMPLATES to a folder with any of them: tests/golden/README.md says how it is laid out.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from strop.core.errors import RequestError
from strop.formats.template import TemplateRenderer
from strop.formats.template_worker import answer, environment
from strop.formats.tokenizer import tokenizer_from_folder

GOLDEN = Path(__file__).parent.parent / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "chat_cases.json").read_text())
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "chat_templates.json").read_text())


@pytest.fixture(scope="module")
def folder() -> Path:
    path = os.environ.get("STROP_CHAT_TEMPLATES")
    if not path:
        pytest.skip("no real chat templates here: set STROP_CHAT_TEMPLATES (tests/golden/README.md)")
    return Path(path)


def digest(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]} {len(text)}"


@pytest.mark.parametrize("name", EXPECTED["packages"])
def test_tokenizers_of_packages(folder: Path, name: str) -> None:
    """The whole way: tokenizer_config.json, the choice of a template, the helper process."""
    if not (folder / name).is_dir():
        pytest.skip(f"{folder / name} is not there")
    tokenizer = tokenizer_from_folder(folder / name / "models", TemplateRenderer(timeout_s=60))
    template = tokenizer.chat_template
    assert template is not None
    try:
        for case, given in CASES.items():
            expected = EXPECTED["packages"][name][case]
            unknown = any(given.get(word) and word not in template for word in ("tools", "documents"))
            try:
                found = digest(tokenizer.apply_chat_template(**given))
            except RequestError:
                found = None
            assert found == (None if unknown else expected), case
    finally:
        tokenizer.close()


@pytest.mark.parametrize("name", EXPECTED["templates"])
def test_templates(folder: Path, name: str) -> None:
    """In this process, where the clock can be set; with tokens of no model."""
    env = environment()
    env.globals["strftime_now"] = datetime.fromisoformat(EXPECTED["made_with"]["clock"]).strftime
    expected: Mapping[str, Any] = EXPECTED["templates"][name]
    paths = list(folder.glob(f"*/{name}"))
    if not paths:
        pytest.skip(f"{folder / '*' / name} is not there")
    source = paths[0].read_bytes().decode()
    if digest(source) != expected["source"]:
        pytest.skip(f"{paths[0]} is another version of this template")
    for case, given in CASES.items():
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, **EXPECTED["made_with"]["tokens"]}
        reply = answer(env, {"template": source, "variables": variables | given, "max_output_bytes": 1 << 20})
        assert (digest(reply["text"].decode()) if "text" in reply else None) == expected[case], (case, reply)
