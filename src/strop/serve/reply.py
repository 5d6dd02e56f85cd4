"""A reply that takes the engine's time: it ends with its last byte, its client's leaving, or its time limit."""

import asyncio
import logging
import time
from typing import Any

from starlette.datastructures import State
from starlette.types import Receive, Scope, Send

from strop.core.errors import EngineDownError, StropError
from strop.serve.gate import json_headers, send_error
from strop.serve.openai.embeddings import EmbeddingsExchange
from strop.serve.openai.errors import ApiError
from strop.serve.service import Service

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 4  # of common text, roughly


class Reply:
    """An ASGI application for one request."""

    def __init__(self, service: Service, state: State) -> None:
        """state: what the gate knows of the request."""
        self._service = service
        self._state = state
        self._began_s = time.monotonic()
        self._stage = "queued"
        self._num_prompt_tokens = self._num_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replies, unless the client leaves first."""
        task = asyncio.current_task()
        assert task is not None
        leaving = asyncio.create_task(self._until_left(receive, task))
        try:
            async with asyncio.timeout(self._service.config.request_timeout_s):
                await self._write(send)
        except asyncio.CancelledError:
            if leaving.done():
                task.uncancel()
                self._service.metrics.cancelled(self._stage)
                log.info("client left", extra=self._facts())
                return
            await self._tell(send, EngineDownError("the server is closing; send the request again"))
            raise
        except TimeoutError:
            limit_s = self._service.config.request_timeout_s
            await self._tell(send, ApiError(f"the answer took longer than {limit_s:.0f} s", status=504, code="timeout"))
        except Exception as error:
            if not isinstance(error, StropError):
                log.exception("a request failed", extra=self._facts())
            await self._tell(send, error)
        finally:
            leaving.cancel()

    async def _write(self, send: Send) -> None:
        """The whole response. Whatever it raises, the client is told."""
        raise NotImplementedError

    async def _fail(self, send: Send, error: Exception) -> None:
        """The error in its place."""
        await send_error(send, error)

    def _done(self) -> None:
        """The client has got everything."""
        duration_s = time.monotonic() - self._began_s
        self._service.metrics.answered(duration_s, self._num_prompt_tokens, self._num_tokens)
        log.info("answered", extra=self._facts())

    async def _tell(self, send: Send, error: Exception) -> None:
        log.info("failed: %s", error, extra=self._facts())
        await self._fail(send, error)

    async def _until_left(self, receive: Receive, task: "asyncio.Task[Any]") -> None:
        """Cancels the task when the client goes away before its end."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._stage != "done":
            task.cancel()

    def _facts(self) -> dict[str, Any]:
        return {
            "request_id": self._state.request_id,
            **({} if self._state.key_name is None else {"key": self._state.key_name}),
            "stage": self._stage,
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "duration_s": round(time.monotonic() - self._began_s, 4),
        }


class Vectors(Reply):
    """Embeddings."""

    def __init__(self, exchange: EmbeddingsExchange, service: Service, state: State) -> None:
        super().__init__(service, state)
        self._exchange = exchange

    async def _write(self, send: Send) -> None:
        service, exchange = self._service, self._exchange
        ticket = service.admission.enter()
        try:
            # The engine makes tokens of texts; before, their number can only be guessed.
            ticket.weigh(sum(_num_tokens(text) for text in exchange.inputs))
            self._stage = "waiting"
            outputs = await service.client.embed(exchange.inputs)
            ticket.start()
            self._num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
            service.metrics.prompt_tokens.inc(self._num_prompt_tokens)
            body = await service.in_thread(exchange.reply, outputs)
            self._stage = "done"
            await send({"type": "http.response.start", "status": 200, "headers": json_headers(body)})
            await send({"type": "http.response.body", "body": body})
            self._done()
        finally:
            ticket.leave()


def _num_tokens(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else 1 + len(text) // _BYTES_PER_TOKEN
