"""The reply to a request that makes the model write."""

import asyncio
import itertools
import time
from collections.abc import Sequence

from starlette.datastructures import State
from starlette.types import Send

from strop.core.errors import RequestError, StropError
from strop.core.request import Request, TokenEvent
from strop.engine.text import StreamDetokenizer, must_abort
from strop.serve.engine_client import Stream
from strop.serve.gate import json_headers
from strop.serve.openai.errors import as_api_error
from strop.serve.openai.exchange import Exchange
from strop.serve.reply import Reply
from strop.serve.service import Service

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
_HEADERS_AFTER_S = 2.0  # without a token: until then a refusal can still have a status of its own
_KEEP_ALIVE_S = 10.0
_numbers = itertools.count()


class Answer(Reply):
    """Text that the model writes, whole or streamed. However it ends, the engine keeps nothing of it."""

    def __init__(self, exchange: Exchange, service: Service, state: State) -> None:
        super().__init__(service, state)
        self._exchange = exchange
        self._last_token_s: dict[tuple[int, int], float] = {}
        self._has_headers = False

    async def _write(self, send: Send) -> None:
        service, exchange = self._service, self._exchange
        ticket = service.admission.enter()
        stream: Stream | None = None
        # Clients may give two requests one id, also at once: the engine must tell them apart.
        unique = f"{self._state.request_id}/{next(_numbers)}"
        try:
            requests = []
            for which, asked in enumerate(exchange.asked):
                prompt_token_ids = await service.prepare(asked)
                params = exchange.begin(which, prompt_token_ids)
                if params.structured_outputs != asked.params.structured_outputs:
                    await service.check_shape(params)
                requests.append(Request(f"{unique}/{which}", prompt_token_ids, params, self._state.salt))
            self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
            ticket.weigh(self._num_prompt_tokens)
            texts = [StreamDetokenizer(service.tokenizer, request.params) for request in requests]
            frames = b""
            stream = service.client.submit(requests)
            self._stage = "waiting"
            while not stream.is_over:
                events = await self._next(stream, send)
                if self._stage == "waiting":
                    self._stage = "streaming"
                    ticket.start()
                self._observe(events)
                for which, event in events:
                    if event.finish_reason == "abort":
                        raise (RequestError if event.fault == "request" else StropError)(str(event.stop_reason))
                    delta = texts[which].push(event)
                    if delta is None:
                        continue
                    if must_abort(event, delta):
                        stream.end_choice(event)
                    if delta.finish_reason is not None:
                        service.metrics.finished(delta.finish_reason)
                    frames += exchange.push(which, delta)
                if exchange.stream and frames:
                    await self._send(send, frames)
                    frames = b""
            body = frames + exchange.end()
            self._stage = "done"  # a client that leaves from here on has got everything
            await self._send(send, body, more=False)
            self._done()
        finally:
            ticket.leave()
            if stream is not None:
                stream.close()

    async def _next(self, stream: Stream, send: Send) -> Sequence[tuple[int, TokenEvent]]:
        """The next events; meanwhile an idle stream shows that it lives."""
        if not self._exchange.stream:
            return await stream.next()
        while True:
            try:
                async with asyncio.timeout(_KEEP_ALIVE_S if self._has_headers else _HEADERS_AFTER_S):
                    return await stream.next()
            except TimeoutError:
                await self._send(send, b": waiting\n\n")

    def _observe(self, events: Sequence[tuple[int, TokenEvent]]) -> None:
        """One clock reading for all: they came in one message."""
        now_s, metrics = time.monotonic(), self._service.metrics
        for which, event in events:
            num_tokens = len(event.token_ids)
            if not num_tokens:
                continue
            last_s = self._last_token_s.get((which, event.index))
            if last_s is not None:
                metrics.itl_s.observe((now_s - last_s) / num_tokens)
            elif not self._num_tokens:
                metrics.ttft_s.observe(now_s - self._began_s)
                metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._last_token_s[which, event.index] = now_s
            self._num_tokens += num_tokens
            metrics.generation_tokens.inc(num_tokens)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if not self._has_headers:
            self._has_headers = True
            headers = _STREAM_HEADERS if self._exchange.stream else json_headers(body)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, send: Send, error: Exception) -> None:
        """A status, or a last frame of a stream that has begun."""
        if not self._has_headers:
            await super()._fail(send, error)
            return
        frames = self._exchange.fail(as_api_error(error))
        await send({"type": "http.response.body", "body": frames, "more_body": False})
