"""The process that compiles grammars for `strop.engine.grammar_check`."""

import time
from typing import Any

import llguidance

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import Vocabulary, compile_matcher, grammar_text
from strop.formats.helper_worker import failure, serve


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
            compile_matcher(self._tokenizer, wanted, grammar_text(wanted))
            return {"compile_s": time.thread_time() - begin_s}
        except RequestError as error:
            return failure("request", str(error))
        except (MemoryError, RecursionError):
            return failure("limit", "structured_outputs is too large or too deep to be compiled: simplify it")
        except Exception as error:
            return failure("compile", f"structured_outputs cannot be compiled: {type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(Compiler())
