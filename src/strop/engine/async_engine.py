"""The engine on a thread of its own, for asyncio callers: each request is an async stream of deltas."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from strop.core.config import EngineConfig
from strop.core.errors import StropError
from strop.core.request import Delta, Request, SamplingParams, TokenEvent
from strop.engine.engine import Engine
from strop.engine.text import Prompt, StreamDetokenizer, must_abort, prepare_prompt

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar_check import GrammarChecker

_Sink = tuple[asyncio.AbstractEventLoop, "asyncio.Queue[TokenEvent | Exception]"]


class AsyncEngine:
    """Serves any number of concurrent `generate` streams. Close it, or use it as a context manager."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._sinks: dict[str, _Sink] = {}  # touched by the engine's thread only
        self._ids = count()
        self._is_closed = False
        self._lock = threading.Lock()  # nothing may be queued behind "close": nobody would read it
        # One thread: prompts reach the engine in the order in which they came, however long each takes.
        self._tokenizing = ThreadPoolExecutor(1, "strop-tokenizer")
        self._thread = threading.Thread(target=self._serve, name="strop-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, model: str, config: EngineConfig | None = None) -> "AsyncEngine":
        """See Engine.load."""
        return cls(Engine.load(model, config))

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come. Leaving the iteration aborts the request and frees its blocks.

        The prompt is tokenised on a thread of its own, first come first served: a long one delays no running stream.

        Raises:
            RequestError: the request is impossible.
            StropError: the engine failed, or was closed.
        """
        params = SamplingParams() if params is None else params
        with self._lock:
            self._check_open()
            tokenized = self._tokenizing.submit(self._prepare, prompt, params)
        token_ids = await asyncio.wrap_future(tokenized)
        request = Request(f"async-{next(self._ids)}", token_ids, params)
        events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        texts, num_open = StreamDetokenizer(self.engine.tokenizer, params), params.n
        with self._lock:
            self._check_open()
            self._commands.put(("add", (request, (asyncio.get_running_loop(), events))))
        try:
            while num_open:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                delta = texts.push(event)
                if delta is None:
                    continue
                if must_abort(event, delta):
                    self._commands.put(("abort", (request.request_id, event.index)))
                num_open -= delta.finish_reason is not None
                yield delta
        finally:
            self._commands.put(("forget", request.request_id))

    def close(self) -> None:
        """Stops the thread; open streams get an error."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(("close", None))
        self._tokenizing.shutdown(wait=False)  # who waits for it finds the engine closed
        self._thread.join()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StropError("the engine is closed: make a new one")

    @cached_property
    def _grammar_checker(self) -> "GrammarChecker":
        from strop.engine.grammar_check import GrammarChecker

        return GrammarChecker(self.engine.tokenizer, self.engine.spec.vocab_size)

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        self._check_open()
        if params.structured_outputs is not None:
            self._grammar_checker.check(params.structured_outputs)
        return prepare_prompt(self.engine.tokenizer, prompt, vocab_size=self.engine.spec.vocab_size)

    def _serve(self) -> None:
        engine = self.engine
        while True:
            while not engine.has_unfinished or not self._commands.empty():
                if not self._obey(*self._commands.get()):
                    self._fail_all(StropError("the engine was closed"))
                    return
            try:
                events = engine.step()
            except Exception as error:  # the engine gave up: every stream must hear of it
                self._fail_all(error)
                continue
            for event in events:
                if event.request_id in self._sinks:
                    _send(self._sinks[event.request_id], event)

    def _obey(self, verb: str, what: Any) -> bool:
        if verb == "add":
            request, sink = what
            try:
                self.engine.add(request)
                self._sinks[request.request_id] = sink
            except Exception as error:  # one caller's problem, not the others'
                _send(sink, error)
        elif verb == "abort":
            self.engine.abort(*what)
        elif verb == "forget":
            self.engine.abort(what)
            self._sinks.pop(what, None)
        return verb != "close"

    def _fail_all(self, error: Exception) -> None:
        for request_id, sink in self._sinks.items():
            self.engine.abort(request_id)
            _send(sink, error)
        self._sinks.clear()


def _send(sink: _Sink, item: TokenEvent | Exception) -> None:
    loop, events = sink
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(events.put_nowait, item)
