"""Greedy answers of a model on this process's devices, one line of JSON for each MESH/LAYOUT of the arguments.

python run_engine.py MODEL MESH/LAYOUT[/batch] ...      ("1/auto" is one device, without a mesh)
python run_engine.py MODEL MESH/LAYOUT HOST:PORT PROCESS_ID      (one of two processes; the first prints)
"""

import json
import sys
from typing import Any

import numpy as np

from strop.core.config import EngineConfig, Processes
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.engine.lead import follow

PROMPT_LENS = (3, 17, 6, 30)
NUM_TOKENS = 6


def answers(
    model: str, mesh: str, layout: str, attention: Any = "heads", processes: Processes | None = None
) -> dict[str, list[int]]:
    config = EngineConfig(
        max_num_seqs=4,
        max_step_tokens=16,
        max_context_len=64,
        mesh="" if mesh == "1" else mesh,
        layout=layout,
        attention=attention,
        processes=processes,
    )
    engine = Engine.load(model, config)
    if processes is None:
        assert sum(cache.nbytes for cache in engine._caches) == engine.memory.cache_bytes
        assert engine.memory.longest(config.max_num_seqs) == config.max_context_len
    rng = np.random.default_rng(0)
    found: dict[str, list[int]] = {}
    for i, length in enumerate(PROMPT_LENS):
        prompt = tuple(rng.integers(2, 200, length).tolist())
        params = SamplingParams(
            temperature=0 if i else 0.7, seed=1, n=1 + (i == 0), max_tokens=NUM_TOKENS, ignore_eos=True
        )
        engine.add(Request(str(i), prompt, params))
    while engine.has_unfinished:
        for event in engine.step():
            found.setdefault(f"{event.request_id}.{event.index}", []).extend(event.token_ids)
    return found


def main(model: str, *arguments: str) -> None:
    if len(arguments) == 3 and arguments[2].isdecimal():
        case, coordinator, process_id = arguments
        processes = Processes(coordinator, 2, int(process_id))
        if processes.process_id:
            follow(model, EngineConfig(processes=processes))
        else:
            print(json.dumps(answers(model, *case.split("/"), processes=processes)), flush=True)
        return
    for case in arguments:
        print(json.dumps(answers(model, *case.split("/"))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
