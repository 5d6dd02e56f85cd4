"""Calls survive the chat templates of real models: what a template writes for a past call is read as that call.

Set STROP_CHAT_TEMPLATES to a folder with any of them: tests/golden/README.md says how it is laid out.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from strop.formats.template_worker import answer, environment
from strop.serve.tool_calls import ToolDelta, Tools, ToolSupport, tool_format

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent.parent / "golden" / "chat_templates.json").read_text())
# These teach a form that is read as it is; to the others ours is taught by text.
TAUGHT = {
    "Bielik-11B-v3.0-Instruct": "hermes",
    "MiMo-VL": "hermes",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Reka-Edge": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "ibm-granite-granite-4.1": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
}
# Without tools the first is not rendered (its model has another template for that); the second wants names of its own.
NOT_RENDERED = ("CohereForAI-c4ai-command-r-plus-tool_use", "fireworks-ai-llama-3-firefunction-v2")

ARGUMENTS = {"city": 'Zü"r}ich\\\n 日😀 </b>', "more": {"a": [1, 2.5, None, True, {"b": "{"}]}, "none": {}}
CALLS = [("weather", ARGUMENTS), ("time", {})]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = Tools(
    (
        {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "time"}},
    )
)
QUESTION = "Weather and time, 7319?"
MESSAGES = [
    {"role": "user", "content": QUESTION},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(CALLS)
        ],
    },
    {"role": "tool", "tool_call_id": "call00000", "content": "sun"},
    {"role": "tool", "tool_call_id": "call00001", "content": "noon"},
]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_calls_survive_templates(name: str) -> None:
    folder = os.environ.get("STROP_CHAT_TEMPLATES")
    if not folder:
        pytest.skip("no real chat templates here: set STROP_CHAT_TEMPLATES (tests/golden/README.md)")
    paths = list(Path(folder).glob(f"*/{name}"))
    stem = name.removesuffix(".jinja")
    if not paths or stem in NOT_RENDERED:
        pytest.skip(f"{name} is not there" if not paths else f"{name} is not rendered without tools")
    source = paths[0].read_bytes().decode()
    support = ToolSupport(tool_format(source))
    assert (support.form.form, support.form.taught) == (TAUGHT.get(stem, "hermes"), stem in TAUGHT)
    variables = GOLDEN["made_with"]["tokens"] | {
        "messages": support.messages(MESSAGES, TOOLS),
        "tools": support.template_tools(TOOLS),
        "documents": None,
        "add_generation_prompt": True,
    }
    reply = answer(environment(), {"template": source, "variables": variables, "max_output_bytes": 1 << 20})
    assert "text" in reply, reply
    before, _, after = reply["text"].decode().rpartition(QUESTION)
    assert '"weather"' in before
    found: dict[int, list[str]] = {}
    for piece in support.parser(TOOLS).push(after, ended=True):
        if isinstance(piece, ToolDelta):
            found.setdefault(piece.index, [piece.name or "", ""])[1] += piece.arguments
    assert [(called, json.loads(arguments)) for called, arguments in found.values()] == CALLS
    assert "sun" in after and "noon" in after
