"""The memory plan against what a process really takes, with the cache filled to the last page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strop.core.config import MIB

_FILL = """
import json, sys
from strop.core.request import SamplingParams
from strop.llm import LLM
from strop.machine.memory import peak_rss_bytes

settings = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], **settings)
num_seqs, max_context_len = settings["max_num_seqs"], settings["max_context_len"]
prompts = [[5 + i + j % 1000 for j in range(max_context_len - 2)] for i in range(num_seqs)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
assert all(len(output.outputs[0].token_ids) == 2 for output in outputs)
memory = llm.engine.memory
assert memory.cache_bytes >= num_seqs * max_context_len * memory.cache_bytes_per_token
print(json.dumps([memory.total_bytes, peak_rss_bytes()]))
"""


@pytest.mark.parametrize(
    ("settings", "environment_changes"),
    [
        ({"max_num_seqs": 8, "max_context_len": 1024}, {}),
        ({"max_num_seqs": 1, "max_context_len": 512, "block_len": 512, "max_step_tokens": 256}, {"STROP_NATIVE": "0"}),
    ],
    ids=["native, packing", "xla"],
)
def test_peak_is_what_was_printed(
    settings: dict[str, int],
    environment_changes: dict[str, str],
    environment: dict[str, str],
    smollm2_path: Path,
    tmp_path: Path,
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _FILL, str(smollm2_path), json.dumps(settings)],
        env=environment | environment_changes | {"STROP_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    planned, peak = json.loads(process.stdout)
    assert peak < 1.1 * planned + 250 * MIB
    assert peak > 0.9 * planned - 250 * MIB
