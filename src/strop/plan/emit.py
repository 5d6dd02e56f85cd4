"""A plan as a file that `serve`, `run` and `bench` take."""

from dataclasses import asdict
from typing import Any

from strop.core.config import EngineConfig
from strop.machine.catalog import THIS
from strop.plan.candidate import Candidate
from strop.plan.search import Plan


def engine_config(chosen: Candidate) -> EngineConfig:
    """Of one copy: its mesh and layout, its batch, prompts beside it, and contexts as long as the longest request.

    Where prompts and answers take different layouts, the engine is left to choose by step.
    """
    placed = [time.placed for time in (chosen.prompt, chosen.decode) if time.placed is not None]
    layouts = {one.layout for one in placed}
    is_spread = chosen.num_devices > 1
    return EngineConfig(
        mesh=str(chosen.model.mesh) if is_spread else "",
        layout=layouts.pop() if is_spread and len(layouts) == 1 else "auto",
        attention=chosen.cache_sharding if is_spread else "heads",
        max_num_seqs=chosen.batch,
        max_step_tokens=chosen.batch + chosen.prompt_pass.tokens,
        max_chunk_tokens=chosen.prompt_pass.tokens,
        max_context_len=chosen.traffic.context_len,
    )


def beyond_the_engine(chosen: Candidate) -> list[str]:
    """What is planned and no engine setting can say: in words, for whoever is to run the plan."""
    found = []
    if chosen.copies > 1:
        found.append(f"one of {chosen.copies} copies: start the others yourself")
    prompts = chosen.prompt.placed
    if chosen.num_devices > 1 and prompts is not None and prompts.sharding != chosen.cache_sharding:
        found.append(f"attention over {prompts.sharding} for prompts: the engine takes one for prompts and answers")
    if chosen.model.device.name != THIS:
        found.append(f"{chosen.model.weight_dtype} weights: the engine takes those of the model's file")
    return found


def plan_file(plan: Plan, model: str) -> dict[str, Any]:
    """What the file holds: `engine` is read, `plan` says what it was made for."""
    return {
        "engine": asdict(engine_config(plan.chosen)),
        "plan": {
            "model": model,
            "hardware": plan.wish.machines.device.name,
            "devices": plan.wish.machines.num_devices,
            "traffic": asdict(plan.wish.traffic),
            "chosen": plan.chosen.as_json(),
            "beyond_the_engine": beyond_the_engine(plan.chosen),
        },
    }
