"""Runs inside a peer's own interpreter, where Strop is not installed: `worker_main.py MODULE SETTINGS [--once N]`.

MODULE sits beside this file and offers `load(weights, num_threads, flags)`, whose result has `describe()`,
`generate(prompts, num_tokens)`, which returns when all prompts have `num_tokens` tokens, and `logits(tokens)`.
Requests and answers are lines of JSON on standard input and output; whatever else prints goes to standard error.
"""

import importlib
import json
import os
import random
import sys
import time


def main() -> None:
    """Serves until standard input ends; with --once answers one prompt, says `token`, and ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[2])
    engine = importlib.import_module(sys.argv[1]).load(settings["weights"], settings["num_threads"], settings["flags"])
    if len(sys.argv) > 4 and sys.argv[3] == "--once":
        num_tokens = int(sys.argv[4])
        engine.generate(prompts(1, 1 if num_tokens == 1 else 128, engine.vocab_size, 1), num_tokens)
        answers.write("token\n")
        answers.flush()
        os._exit(0)

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say(engine.describe())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "logits":
                import numpy as np

                np.savez(request["path"], **engine.logits(request["tokens"]))
                say({})
                continue
            ids = prompts(request["num_prompts"], request["prompt_len"], engine.vocab_size, request["seed"])
            begin = time.perf_counter()
            engine.generate(ids, request["num_tokens"])
            say({"seconds": time.perf_counter() - begin})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"[:500]})


def prompts(num_prompts: int, prompt_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids that no two prompts and no two seeds share."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size // 16, vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]


if __name__ == "__main__":
    main()
