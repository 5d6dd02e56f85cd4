"""Runs everything: the sockets, the engine's process, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from strop.core.config import EngineConfig
from strop.core.errors import CapacityError
from strop.engine.messages import ModelFacts
from strop.formats.tokenizer import Tokenizer
from strop.serve.app import make_app
from strop.serve.engine_client import EngineClient
from strop.serve.http import BoundedHttp
from strop.serve.keys import KeyFile
from strop.serve.service import Service
from strop.serve.settings import ServeConfig

log = logging.getLogger(__name__)


def serve(
    model: str,
    tokenizer: Tokenizer,
    config: ServeConfig,
    engine_config: EngineConfig,
    *,
    on_listen: Callable[[str], None] = lambda url: None,
    on_load: Callable[[ModelFacts], None] = lambda facts: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets the requests at hand end. Raises StropError when it cannot start.

    Args:
        model: a name, as `load_model` takes it, whose tokenizer is `tokenizer`.
        on_listen: called with the URL as soon as requests are heard; until the engine has loaded they get 503.
        on_load: called when it has.
    """
    # One text at a time: threads of the tokenizer's own would only take the engine's cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keys = None if config.api_keys is None else KeyFile(config.api_keys)
    with _listening_socket(config.host, config.port) as listener, asyncio.Runner(loop_factory=_new_loop) as runner:
        client = EngineClient(
            model,
            engine_config,
            config.runner,
            step_deadline_s=config.step_deadline_s,
            kill_after_s=5 * config.step_deadline_s,
        )
        service = Service(config, tokenizer, client)
        server = _Server(service, keys)
        host, port = listener.getsockname()[:2]
        on_listen(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        runner.run(_run(server, client, listener, on_load))
        service.close()


async def _run(
    server: "_Server", client: EngineClient, listener: socket.socket, on_load: Callable[[ModelFacts], None]
) -> None:
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(client.start())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            on_load(loading.result())
        await serving
    finally:
        server.should_exit = server.force_exit = True
        loading.cancel()
        await asyncio.gather(serving, loading, return_exceptions=True)
        await client.close()


class _Server(uvicorn.Server):
    """Ends when it is told to; the signal is not raised again afterwards, so that what is open gets closed."""

    def __init__(self, service: Service, keys: KeyFile | None) -> None:
        self._service = service
        super().__init__(
            uvicorn.Config(
                make_app(service, keys),
                http=BoundedHttp,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, round(service.config.drain_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While serving, SIGTERM and SIGINT begin the end; a second SIGINT forces it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Serves to the end what it has, and takes nothing more."""
        log.info("%s: ending the requests at hand, for up to %.0f s", signal.Signals(sig).name, self.drain_s)
        self._service.is_draining = True
        super().handle_exit(sig, frame)

    @property
    def drain_s(self) -> float:
        """How long the requests at hand may take."""
        return self._service.config.drain_s


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _listening_socket(host: str, port: int) -> socket.socket:
    """Raises CapacityError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise CapacityError(f"{host}:{port} cannot be listened on ({error}): choose another --host or --port") from None
