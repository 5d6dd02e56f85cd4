"""The process that compiles grammars for `strop.engine.grammar_check`."""

import random
import time
from typing import Any

import llguidance

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import Matcher, Vocabulary, compile_matcher, grammar_text
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
            text = grammar_text(wanted)
            compile_matcher(self._tokenizer, wanted, text)
            compile_s = time.thread_time() - begin_s
            try_out(self._tokenizer, text)
            return {"compile_s": compile_s}
        except RequestError as error:
            return failure("request", str(error))
        except (MemoryError, RecursionError):
            return failure("limit", "structured_outputs is too large or too deep to be compiled: simplify it")
        except Exception as error:
            return failure("compile", f"structured_outputs cannot be compiled: {type(error).__name__}: {error}")


def try_out(tokenizer: llguidance.LLTokenizer, text: str) -> None:
    """Writes the beginnings of a few answers at random. RequestError if one of them outgrows the limits at once."""
    rng = random.Random(0)
    ends = set(tokenizer.eos_tokens)
    for _ in range(_NUM_TRIALS):
        matcher = Matcher(tokenizer, text)
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
