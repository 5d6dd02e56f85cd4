"""Whether structured output can be had, found out in a helper process: a schema or a grammar can be hostile."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import msgspec

from strop.core.config import GIB
from strop.core.errors import CapacityError, RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.grammar import TokenSpellings, Vocabulary, check_sizes
from strop.formats.helper import Helper

MAX_CACHED_VERDICTS = 1024
_MAX_REPLY_BYTES = 64 * 1024
_VOCABULARY_TIMEOUT_S = 60.0


class GrammarChecker:
    """Compiles what requests want, one at a time, with limits on time and memory; for whoever takes requests in.

    What passes, the engine compiles again in about the same time: `compile_s` bounds how long that holds it up.
    Safe to use from several threads. `start()` early hides the helper's start behind other work.
    """

    def __init__(
        self,
        tokenizer: TokenSpellings,
        vocab_size: int | None = None,
        *,
        timeout_s: float = 3.0,
        compile_s: float = 0.5,
        memory_bytes: int = 1 * GIB,
    ) -> None:
        """`vocab_size` is the model's, where it exceeds the tokenizer's."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.timeout_s = timeout_s
        self.compile_s = compile_s
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._helper: Helper | None = None
        self._has_vocabulary = False
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    def start(self) -> None:
        """Start the helper without waiting for it."""
        with self._lock:
            self._running_helper()

    def check(self, wanted: StructuredOutputsParams) -> None:
        """Returns if the engine can enforce `wanted`.

        Raises RequestError if it cannot, or not within the limits; CapacityError if too many wait to be checked.
        """
        check_sizes(wanted)
        request = msgspec.msgpack.encode({"wanted": _given(wanted)})
        key = hashlib.sha256(request).digest()
        if not self._lock.acquire(timeout=4 * self.timeout_s):
            raise CapacityError("too many grammars wait to be compiled: try again later")
        try:
            if key not in self._verdicts:
                self._verdicts[key] = self._verdict(request)
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > MAX_CACHED_VERDICTS:
                self._verdicts.popitem(last=False)
            verdict = self._verdicts[key]
        finally:
            self._lock.release()
        if verdict is not None:
            raise RequestError(verdict)

    def close(self) -> None:
        """Stop the helper; a later `check` starts another."""
        with self._lock:
            self._drop_helper()

    def _verdict(self, request: bytes) -> str | None:
        """What is wrong with it, None if nothing."""
        helper = self._running_helper()
        try:
            helper.wait_ready()
            if not self._has_vocabulary:
                vocabulary = msgspec.msgpack.encode({"vocabulary": Vocabulary.of(self._tokenizer, self._vocab_size)})
                self._exchange(helper, vocabulary, _VOCABULARY_TIMEOUT_S)
                self._has_vocabulary = True
            reply = self._exchange(helper, request, self.timeout_s)
        except TimeoutError:
            self._drop_helper()
            return f"structured_outputs took longer than {self.timeout_s:g} s to compile: simplify it"
        except (OSError, EOFError):
            self._drop_helper()
            return "structured_outputs ended the process that compiles it (too deep, or too large): simplify it"
        except BaseException:
            self._drop_helper()  # a half-read reply must not answer the next request
            raise
        if "error" in reply:
            return str(reply["message"])
        if reply["compile_s"] > self.compile_s:
            took = f"{reply['compile_s']:.1f} s of the processor, more than {self.compile_s:g} s"
            return f"structured_outputs takes {took}, to compile: simplify it"
        return None

    def _exchange(self, helper: Helper, request: bytes, timeout_s: float) -> dict[str, Any]:
        frame = len(request).to_bytes(4, "little") + request
        reply: dict[str, Any] = msgspec.msgpack.decode(
            helper.exchange(frame, max_reply_bytes=_MAX_REPLY_BYTES, timeout_s=timeout_s)
        )
        return reply

    def _running_helper(self) -> Helper:
        if self._helper is None or self._helper.ended:
            self._drop_helper()
            cpu_s = int(max(self.timeout_s, _VOCABULARY_TIMEOUT_S)) + 2
            self._helper = Helper("strop.engine.grammar_worker", self.memory_bytes, cpu_s)
        return self._helper

    def _drop_helper(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None
            self._has_vocabulary = False


def _given(wanted: StructuredOutputsParams) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in wanted.__slots__ if getattr(wanted, name) not in (None, False)}
