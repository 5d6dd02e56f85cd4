"""The engine's process as the API process sees it: started, watched, restarted, and asked for streams of tokens."""

import asyncio
import contextlib
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from strop.core import errors
from strop.core.config import EngineConfig
from strop.core.errors import EngineDownError, StropError
from strop.core.request import EmbeddingRequestOutput, Request, TokenEvent
from strop.engine.loading import Runner
from strop.engine.messages import (
    HEARTBEAT_S,
    Abort,
    Add,
    Alive,
    Command,
    Embed,
    Embedded,
    EngineStats,
    Failed,
    Loaded,
    ModelFacts,
    Stepped,
    decode_message,
    encode,
)
from strop.engine.process import Orders

Socket = TypeVar("Socket", bound="zmq.Socket[Any]")

log = logging.getLogger(__name__)

_SILENCE_S = 4.0  # heartbeats come every HEARTBEAT_S; a loaded machine delays them
_FAREWELL_S = 10.0
_FIRST_RESTART_S, _LAST_RESTART_S = 0.5, 30.0


class Stream:
    """The token events of some requests, asked together. Close it: what the engine still does for it is dropped."""

    def __init__(self, client: "EngineClient", requests: Sequence[Request]) -> None:
        self._client = client
        self._which = {request.request_id: which for which, request in enumerate(requests)}
        self._open = {(request.request_id, index) for request in requests for index in range(request.params.n)}
        self._events: list[TokenEvent] = []
        self._error: StropError | None = None
        self._has_news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended, and nothing more will come."""
        return not self._open

    async def next(self) -> list[tuple[int, TokenEvent]]:
        """(which request, event) of all that has come since the last call, and waits until there is some.

        Raises StropError when the engine refused or lost one of the requests.
        """
        await self._has_news.wait()
        self._has_news.clear()
        events, self._events = self._events, []
        if self._error is not None:
            raise self._error
        news = []
        for event in events:
            choice = event.request_id, event.index
            if choice in self._open:
                news.append((self._which[event.request_id], event))
                if event.finish_reason is not None:
                    self._open.discard(choice)
        return news

    def end_choice(self, event: TokenEvent) -> None:
        """Nothing more is wanted of the choice that this event is of."""
        self._open.discard((event.request_id, event.index))
        self._client.send(Abort(event.request_id, event.index))

    def close(self) -> None:
        """Nothing more is wanted at all."""
        unfinished = {request_id for request_id, _ in self._open}
        for request_id in self._which:
            self._client.forget(request_id, is_over=request_id not in unfinished)
        self._open.clear()

    def put(self, item: TokenEvent | StropError) -> None:
        """What came from the engine."""
        if isinstance(item, StropError):
            self._error = item
        else:
            self._events.append(item)
        self._has_news.set()


class EngineClient:
    """Keeps an engine process alive and passes requests to it. All methods belong to one event loop."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        runner: Runner = "auto",
        *,
        step_deadline_s: float = 60.0,
        kill_after_s: float = 300.0,
    ) -> None:
        """step_deadline_s: a step that takes longer makes the engine count as stalled; kill_after_s: and restarted."""
        self.facts: ModelFacts | None = None
        """Of the engine that runs; None while there is none."""
        self.stats = EngineStats()
        self.num_restarts = 0
        self.on_step: Callable[[Stepped], None] | None = None
        self._orders = Orders(
            model, config, runner, "", "", logging.getLevelName(logging.getLogger().getEffectiveLevel())
        )
        self._step_deadline_s = step_deadline_s
        self._kill_after_s = kill_after_s
        self._streams: dict[str, Stream] = {}
        self._embed_numbers = itertools.count()
        self._embeds: dict[str, asyncio.Future[list[EmbeddingRequestOutput]]] = {}
        self._commands: zmq.Socket[bytes] | None = None
        self.pid: int | None = None
        """Of the engine's process."""
        self._heard_s = 0.0
        self._step_age_s: float | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_closing = False

    async def start(self) -> ModelFacts:
        """Starts the engine and waits until it has loaded. Raises its error if it cannot."""
        loaded: asyncio.Future[ModelFacts] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(loaded))
        return await loaded

    async def close(self) -> None:
        """Ends the engine's process; open streams get an error."""
        self._is_closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._fail_all(EngineDownError("the server is closing: send the request to another one, or later"))

    @property
    def trouble(self) -> str | None:
        """Why the engine cannot make progress now; None when it can, or has nothing to do."""
        if self.facts is None:
            return "the engine is loading" if self.num_restarts == 0 else "the engine is starting again"
        silence_s = time.monotonic() - self._heard_s
        if silence_s > _SILENCE_S:
            return f"the engine's process has been silent for {silence_s:.1f} s"
        if self._step_age_s is not None and self._step_age_s > self._step_deadline_s:
            return f"the engine has been in one step for {self._step_age_s:.0f} s"
        return None

    @property
    def num_streams(self) -> int:
        """Requests that the engine has and that somebody still listens to."""
        return len(self._streams)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Gives the engine some requests. Raises EngineDownError while there is no engine."""
        if self.facts is None:
            raise EngineDownError(f"{self.trouble}: send the request again in a few seconds")
        stream = Stream(self, requests)
        for request in requests:
            self._streams[request.request_id] = stream
            self.send(Add(request))
        return stream

    async def embed(self, texts: Sequence[str | tuple[int, ...]]) -> list[EmbeddingRequestOutput]:
        """Vectors of texts or of token ids. Raises StropError when the engine refuses or loses the request."""
        if self.facts is None:
            raise EngineDownError(f"{self.trouble}: send the request again in a few seconds")
        request_id = f"embed-{next(self._embed_numbers)}"
        outputs = self._embeds[request_id] = asyncio.get_running_loop().create_future()
        self.send(Embed(request_id, list(texts)))
        try:
            return await outputs
        except asyncio.CancelledError:
            self.send(Abort(request_id))
            raise
        finally:
            del self._embeds[request_id]

    def forget(self, request_id: str, *, is_over: bool) -> None:
        """Nobody listens any more; unless the engine is done with the request, it is told so."""
        if self._streams.pop(request_id, None) is not None and not is_over:
            self.send(Abort(request_id))

    def send(self, command: Command) -> None:
        """To the engine, if there is one."""
        if self._commands is not None:
            with contextlib.suppress(zmq.Again):  # it has just died
                self._commands.send(encode(command), zmq.DONTWAIT)

    async def _supervise(self, loaded: "asyncio.Future[ModelFacts]") -> None:
        pause_s = _FIRST_RESTART_S
        while True:
            began_s = time.monotonic()
            try:
                error = await self._run_engine(loaded)
            except Exception as unexpected:  # whatever it was, the next engine may do better
                log.exception("the engine's messages could not be read")
                error = EngineDownError(f"the engine was lost ({unexpected})")
            finally:
                self.facts = self._commands = None
            if not loaded.done():
                loaded.set_exception(error)
                return
            self.num_restarts += 1
            pause_s = _FIRST_RESTART_S if time.monotonic() - began_s > 60 else min(2 * pause_s, _LAST_RESTART_S)
            log.error("%s; %d requests were lost; starting it again in %.1f s", error, len(self._streams), pause_s)
            self._fail_all(error)
            await asyncio.sleep(pause_s)

    async def _run_engine(self, loaded: "asyncio.Future[ModelFacts]") -> StropError:
        """One life of the engine's process; returns why it ended."""
        with tempfile.TemporaryDirectory(prefix="strop-") as folder, contextlib.ExitStack() as stack:
            orders = msgspec.structs.replace(self._orders, commands=f"ipc://{folder}/c", messages=f"ipc://{folder}/m")
            commands: zmq.Socket[bytes] = _bound(stack, zmq.Context.instance().socket(zmq.PUSH), orders.commands)
            messages = _bound(stack, zmq.asyncio.Context.instance().socket(zmq.PULL), orders.messages)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "strop.serve.engine_main", stdin=asyncio.subprocess.PIPE, start_new_session=True
            )
            self.pid = process.pid
            self._heard_s, self._step_age_s, self._commands = time.monotonic(), None, commands
            listening = asyncio.create_task(self._listen(messages, loaded))
            watching = asyncio.create_task(self._watch())
            ending = asyncio.create_task(process.wait())
            assert process.stdin is not None
            try:
                process.stdin.write(msgspec.json.encode(orders) + b"\n")
                await asyncio.wait({listening, watching, ending}, return_when=asyncio.FIRST_COMPLETED)
                if listening.done():
                    return listening.result()
                if ending.done():
                    with contextlib.suppress(asyncio.TimeoutError):  # its last words
                        return await asyncio.wait_for(listening, 0.2)
                    return EngineDownError(f"the engine's process ended ({_exit(process.returncode)})")
                return EngineDownError(f"{watching.result()}; its process was killed")
            finally:
                for task in (listening, watching, ending):
                    task.cancel()
                if self._is_closing and orders.config.processes is not None:
                    process.stdin.close()  # it lets the other processes end
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(process.wait(), _FAREWELL_S)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _listen(self, messages: zmq.asyncio.Socket, loaded: "asyncio.Future[ModelFacts]") -> StropError:
        """Passes on what the engine says; returns if it says that it cannot be."""
        while True:
            message = decode_message(await messages.recv())
            self._heard_s = time.monotonic()
            match message:
                case Stepped(events, stats):
                    self.stats = stats
                    for event in events:
                        stream = self._streams.get(event.request_id)
                        if stream is not None:
                            stream.put(event)
                    if self.on_step is not None:
                        self.on_step(message)
                case Embedded(request_id, outputs):
                    if request_id in self._embeds and not self._embeds[request_id].done():
                        self._embeds[request_id].set_result(outputs)
                case Alive(step_age_s):
                    self._step_age_s = step_age_s
                case Loaded(facts):
                    self.facts, self.stats = facts, EngineStats()  # nothing of an engine before this one
                    if not loaded.done():
                        loaded.set_result(facts)
                case Failed(None, kind, text):
                    return _error(kind, text)
                case Failed(str(request_id), kind, text):
                    self._fail(request_id, _error(kind, text))

    async def _watch(self) -> str:
        """Returns what is wrong with an engine that no longer makes progress at all."""
        while True:
            await asyncio.sleep(2 * HEARTBEAT_S)
            silence_s = time.monotonic() - self._heard_s
            if max(silence_s, self._step_age_s or 0.0) > self._kill_after_s:
                return self.trouble or "the engine makes no progress"

    def _fail(self, request_id: str, error: StropError) -> None:
        if request_id in self._streams:
            self._streams[request_id].put(error)
        elif request_id in self._embeds and not self._embeds[request_id].done():
            self._embeds[request_id].set_exception(error)

    def _fail_all(self, error: StropError) -> None:
        for request_id in [*self._streams, *self._embeds]:
            self._fail(request_id, error)
        self._streams.clear()


def _bound(stack: contextlib.ExitStack, socket: Socket, address: str) -> Socket:
    socket.set_hwm(0)
    socket.linger = 0
    socket.bind(address)
    stack.callback(socket.close)
    return socket


def _error(kind: str, text: str) -> StropError:
    found = getattr(errors, kind, StropError)
    return (found if isinstance(found, type) and issubclass(found, StropError) else StropError)(text)


def _exit(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
