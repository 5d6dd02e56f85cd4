"""The engine in a process of its own, started by a front end.

One line of JSON on standard input says what to load and where the sockets are. Then requests come over ZeroMQ, and one
message a step goes back, so that neither side waits for the other. The end of standard input, which is also the end of
the front end, ends the process.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import zmq

from strop.core.config import EngineConfig
from strop.core.errors import EngineDownError, RequestError, StropError
from strop.core.request import EmbeddingRequestOutput
from strop.engine.loading import Runner, load_model
from strop.engine.messages import (
    HEARTBEAT_S,
    Abort,
    Add,
    Alive,
    Command,
    Embed,
    Embedded,
    EngineStats,
    Expected,
    Loaded,
    Message,
    ModelFacts,
    Stepped,
    decode_command,
    encode,
    failed,
)
from strop.ops import native

if TYPE_CHECKING:
    from strop.engine.embedder import Embedder
    from strop.engine.engine import Engine
    from strop.engine.group import Followers
    from strop.engine.limit import StepLimit

log = logging.getLogger(__name__)

_TURN_S = 0.05
_LAST_WORDS_S = 5.0

Settle = Callable[[str, EngineConfig, Runner], tuple[EngineConfig, Expected | None]]
"""Gives numbers to the budgets of a config that are 0."""


class Orders(msgspec.Struct):
    """What the front end wants: the line on standard input."""

    model: str
    config: EngineConfig
    runner: Runner
    commands: str
    """ZeroMQ addresses: where commands come from,"""
    messages: str
    """and where messages go."""
    log_level: str = "INFO"


def main(settle: Settle = lambda model, config, runner: (config, None)) -> None:
    """Entry point of the process."""
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    logging.basicConfig(level=orders.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    context = zmq.Context()
    server = EngineServer(
        _connected(context, zmq.PULL, orders.commands), _connected(context, zmq.PUSH, orders.messages)
    )
    pulse = _connected(context, zmq.PUSH, orders.messages)
    threading.Thread(target=_beat, args=(pulse, server), name="strop-pulse", daemon=True).start()
    threading.Thread(target=_end_with_input, args=(server,), name="strop-parent", daemon=True).start()
    server.run(orders.model, orders.config, orders.runner, settle)


class EngineServer:
    """Obeys commands between steps and reports every step."""

    def __init__(self, commands: "zmq.Socket[bytes]", messages: "zmq.Socket[bytes]") -> None:
        self.step_began_s: float | None = None
        """time.monotonic() of the present step; None between steps. Read by the pulse's thread."""
        self._commands = commands
        self._messages = messages
        self._limit: StepLimit | None = None
        self._followers: Followers | None = None

    def run(self, model: str, config: EngineConfig, runner: Runner, settle: Settle) -> None:
        """Loads, then serves; returns only if the model cannot be loaded, or another process of it was lost."""
        from strop.engine.embedder import Embedder
        from strop.engine.engine import Engine
        from strop.engine.group import Followers
        from strop.engine.limit import step_limit

        try:
            config, expected = settle(model, config, runner)
            loaded, config = load_model(model, config, runner=runner)
            self._followers = loaded.group if isinstance(loaded.group, Followers) else None
            engine = Engine(loaded, config) if loaded.pooling is None else Embedder(loaded, config)
            self._limit = step_limit(engine) if isinstance(engine, Engine) else None
        except Exception as error:
            if not isinstance(error, StropError):
                log.exception("loading failed")
            self._send(failed(error))
            return
        self._send(Loaded(_facts(engine, expected)))
        if not isinstance(engine, Engine):
            self._pool(engine)
            return
        try:
            self._write(engine)
        except EngineDownError as error:
            self._send(failed(error))
            time.sleep(_LAST_WORDS_S)  # the front end ends this process when it has read that

    def end(self) -> None:
        """Ends the other processes of the engine."""
        if self._followers is not None:
            self._followers.close()

    def _write(self, engine: "Engine") -> None:
        was_idle = True
        while True:
            while not engine.has_unfinished or self._commands.poll(0):
                if not engine.has_unfinished and not was_idle:
                    was_idle = True
                    self._send(Stepped([], _stats(engine, 0.0)))
                self._obey(engine, self._next_command())
            was_idle = False
            self._step(engine)

    def _next_command(self) -> Command:
        """Waits for it. EngineDownError if another process is lost in the meantime."""
        if self._followers is not None:
            poller = zmq.Poller()
            for descriptor in self._followers.descriptors:
                poller.register(descriptor, zmq.POLLIN)
            poller.register(self._commands, zmq.POLLIN)
            poller.poll()
            self._followers.check()
        return decode_command(self._commands.recv())

    def _obey(self, engine: "Engine", command: Command) -> None:
        match command:
            case Add(request):
                try:
                    engine.add(request)
                except Exception as error:  # one caller's problem, not the others'
                    self._send(failed(error, request.request_id))
            case Abort(request_id, index):
                engine.abort(request_id, index)
            case Embed(request_id):
                self._send(failed(RequestError("this engine was loaded to write, not to make vectors"), request_id))

    def _step(self, engine: "Engine") -> None:
        """Any other error than those an engine raises on purpose ends the process: its state cannot be trusted."""
        self.step_began_s = began_s = time.monotonic()
        try:
            events = engine.step()
        except EngineDownError:
            raise
        except StropError as error:  # the engine gave up on all it had: their callers must hear of it
            request_ids = engine.scheduler.request_ids
            log.exception("the engine gave up on %d requests", len(request_ids))
            for request_id in request_ids:
                engine.abort(request_id)
                self._send(failed(error, request_id))
            events = []
        finally:
            self.step_began_s = None
        self._send(Stepped(events, self._step_stats(engine, time.monotonic() - began_s)))

    def _step_stats(self, engine: "Engine", step_s: float) -> EngineStats:
        stats = _stats(engine, step_s)
        if self._limit is not None and engine.last_step.rows:
            stats.limit_s = self._limit.seconds(engine.last_step.rows)
        return stats

    def _pool(self, embedder: "Embedder") -> None:
        jobs: dict[str, _Vectors] = {}
        while True:
            while not jobs or self._commands.poll(0):
                self._obey_pooling(embedder, jobs, decode_command(self._commands.recv()))
            request_id, job = next(iter(jobs.items()))
            del jobs[request_id]  # to the end of the line, unless it is done
            self.step_began_s = began_s = time.monotonic()
            try:
                if job.work():
                    self._send(Embedded(request_id, job.outputs))
                else:
                    jobs[request_id] = job
            except Exception as error:
                if not isinstance(error, StropError):
                    log.exception("a request failed")
                self._send(failed(error, request_id))
            finally:
                self.step_began_s = None
            self._send(Stepped([], EngineStats(len(jobs), step_s=time.monotonic() - began_s)))

    def _obey_pooling(self, embedder: "Embedder", jobs: "dict[str, _Vectors]", command: Command) -> None:
        match command:
            case Embed(request_id, texts):
                jobs[request_id] = _Vectors(embedder.embed(texts, truncate=False))
            case Abort(request_id):
                jobs.pop(request_id, None)
            case Add(request):
                error = RequestError("this engine was loaded to make vectors, not to write")
                self._send(failed(error, request.request_id))

    def _send(self, message: Message) -> None:
        self._messages.send(encode(message))


class _Vectors:
    """A request for vectors, made a few at a time: a long one delays a short one little, and can be dropped."""

    def __init__(self, coming: Iterator[EmbeddingRequestOutput]) -> None:
        self.outputs: list[EmbeddingRequestOutput] = []
        self._coming = coming

    def work(self) -> bool:
        """Goes on for a moment. Whether it is done."""
        end_s = time.monotonic() + _TURN_S
        for output in self._coming:
            self.outputs.append(output)
            if time.monotonic() > end_s:
                return False
        return True


def _facts(engine: "Engine | Embedder", expected: Expected | None) -> ModelFacts:
    from strop.engine.engine import Engine

    memory, config, writes = engine.memory, engine.config, isinstance(engine, Engine)
    return ModelFacts(
        engine.spec.vocab_size,
        config.max_context_len,
        engine.scheduler.max_request_tokens if isinstance(engine, Engine) else config.max_context_len,
        config.max_num_seqs,
        sum(pool.num_usable for pool in engine.scheduler.pools) if isinstance(engine, Engine) else 0,
        memory.weight_bytes,
        memory.cache_bytes_per_token,
        memory.describe(),
        native.isa() or "xla",
        None if writes else engine.spec.model_dim,
        expected,
    )


def _stats(engine: "Engine", step_s: float) -> EngineStats:
    scheduler = engine.scheduler
    used = [(pool.num_usable - pool.num_free, pool.num_usable) for pool in scheduler.pools]
    num_used = sum(count for count, _ in used)
    return EngineStats(
        scheduler.num_running,
        scheduler.num_waiting,
        num_used,
        0 if scheduler.has_unfinished else num_used,
        max(count / total for count, total in used),
        scheduler.num_preemptions,
        scheduler.num_prefix_query_tokens,
        scheduler.num_prefix_hit_tokens,
        engine.last_step.num_tokens,
        step_s,
    )


def _connected(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, address: str) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(0)  # a front end that is slow to read must not hold up a step
    socket.connect(address)
    return socket


def _beat(messages: "zmq.Socket[bytes]", server: EngineServer) -> None:
    while True:
        began_s = server.step_began_s
        messages.send(encode(Alive(None if began_s is None else time.monotonic() - began_s)))
        time.sleep(HEARTBEAT_S)


def _end_with_input(server: EngineServer) -> None:
    """The front end keeps standard input open as long as it lives."""
    while sys.stdin.buffer.read(4096):
        pass
    server.end()
    os._exit(0)


if __name__ == "__main__":
    main()
