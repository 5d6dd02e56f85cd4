"""What a verb does where several processes run one engine."""

import os
import sys

from strop.core.config import EngineConfig


def follow(model: str, config: EngineConfig) -> None:
    """Lends this process's devices to the first one, until that ends."""
    from strop.engine import lead  # with jax

    lead.follow(model, config, on_plan=lambda plan: print(plan.describe(), file=sys.stderr))
    print("process 0 has ended", file=sys.stderr)


def keep_standard_output() -> None:
    """For what Python writes alone: gloo, in C++, tells there of every connection, which now goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
