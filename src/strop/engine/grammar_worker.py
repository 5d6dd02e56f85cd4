"""The process that compiles grammars for `strop.engine.grammar_check`."""

import random
import time
from typing import Any

import llguidance

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import Matcher, Vocabulary, compiled_or_refused, grammar_text
from strop.formats.helper_worker import failure, serve

_NUM_TRIALS, _TRIAL_TOKENS = 4, 16


class Compiler:
    """Answers requests: first one with the vocabulary, then wishes."""

    def __init__(self) -> None:
        self._tokenizer: llguidance.LLTokenizer | None = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """{} or {"compile_s": processor time} or {"error": kind, "message": str}; never raises an Exception."""
        try:
            if "vocabulary" in request:
                self._tokenizer = Vocabulary(**request["vocabulary"]).build()
                return {}
            assert self._tokenizer is not None
            wanted = StructuredOutputsParams(**request["wanted"])
            begin_s = time.thread_time()
            start = compiled_or_refused(self._tokenizer, wanted, grammar_text(wanted))
            compile_s = time.thread_time() - begin_s
            try_out(start, set(self._tokenizer.eos_tokens))
            return {"compile_s": compile_s}
        except RequestError as error:
            return failure("request", str(error))
        except (MemoryError, RecursionError):
            return failure("limit", "structured_outputs is too large or too deep to be compiled: simplify it")
        except Exception as error:
            return failure("compile", f"structured_outputs cannot be compiled: {type(error).__name__}: {error}")


def try_out(start: Matcher, ends: set[int]) -> None:
    """Writes the beginnings of a few answers at random. RequestError if one of them outgrows the limits at once."""
    rng = random.Random(0)
    for _ in range(_NUM_TRIALS):
        matcher = start.copy()
        for _ in range(_TRIAL_TOKENS):
            allowed = matcher.allowed_ids()
            if matcher.error is not None:
                why = f"after a few tokens already ({matcher.error})"
                raise RequestError(f"structured_outputs is too costly to enforce, {why}: simplify it")
            drawn = [int(rng.choice(allowed)) for _ in range(8)]
            going_on = [token_id for token_id in drawn if token_id not in ends]
            if not going_on:
                break
            matcher.advance(going_on[0])


if __name__ == "__main__":
    compiler = Compiler()
    # What is imported on first use must be there before this process can open no file more.
    compiler({"vocabulary": {"tokens": [b"{", b"}", b""], "special_ids": [2], "eos_ids": [2]}})
    compiler({"wanted": {"json_object": True}})
    serve(compiler)
