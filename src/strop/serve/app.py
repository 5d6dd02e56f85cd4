"""The routes."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from strop import __version__
from strop.core.errors import EngineDownError
from strop.serve import page
from strop.serve.answer import Answer
from strop.serve.gate import Gate, read_body
from strop.serve.keys import KeyFile
from strop.serve.openai import chat, completions, embeddings, models, openapi, responses, tokenize
from strop.serve.openai.exchange import Exchange, Served
from strop.serve.reply import Vectors
from strop.serve.service import Service
from strop.serve.status import status_body

OPEN_PATHS = ("/livez", "/readyz", "/health", *page.PATHS)
"""What needs no key: those who probe have none, and the page asks for one."""


def _got(about: str, media_type: str = "application/json", kind: str = "object") -> dict[str, Any]:
    """OpenAPI's description of a GET."""
    error = {"$ref": "#/components/responses/Error"}
    done = {"description": "done", "content": {media_type: {"schema": {"type": kind}}}}
    return {"get": {"summary": about, "responses": {"200": done, "4XX": error, "5XX": error}}}


OTHER_PATHS = {
    "/livez": _got("whether requests are heard"),
    "/readyz": _got("whether the model is loaded and makes progress"),
    "/health": _got("the same, by vLLM's name"),
    "/status": _got("the model's card and live figures"),
    "/metrics": _got("for Prometheus", "text/plain", "string"),
    "/openapi.json": _got("this document"),
    "/": _got("a page to chat with the model and to watch the server", "text/html", "string"),
}
"""OpenAPI's path items of what is not OpenAI's."""


class Parse(Protocol):
    """Of an endpoint whose answer the model writes."""

    def __call__(self, body: bytes, served: Served, *, request_id: str, created_s: int) -> Exchange:
        """What the body asks for; ApiError for one that is refused."""
        ...


Handler = Callable[[Request], Awaitable[ASGIApp]]


def make_app(service: Service, keys: KeyFile | None) -> ASGIApp:
    """The ASGI application."""
    router = Router(Routes(service).table(), redirect_slashes=False)
    app: ASGIApp = Gate(router, service, keys, OPEN_PATHS)
    if service.config.cors_origins:
        headers = ["authorization", "content-type", "x-request-id"]
        app = CORSMiddleware(app, allow_origins=service.config.cors_origins, allow_methods=["*"], allow_headers=headers)
    return app


class Routes:
    """One method per route, or per kind of them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """All there are."""
        return [
            Route("/v1/chat/completions", self.writes(chat.parse), methods=["POST"]),
            Route("/v1/completions", self.writes(completions.parse), methods=["POST"]),
            Route("/v1/responses", self.writes(responses.parse), methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/status", self.status, methods=["GET"]),
            Route("/livez", self.livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/health", self.readyz, methods=["GET"]),
            *page.routes(),
        ]

    def writes(self, parse: Parse) -> Handler:
        """A route whose answer the model writes."""

        async def handle(request: Request) -> ASGIApp:
            body, state = await self._body(request), request.state
            exchange = parse(body, self._service.served, request_id=state.request_id, created_s=int(time.time()))
            return Answer(exchange, self._service, state)

        return handle

    async def embeddings(self, request: Request) -> ASGIApp:
        """Vectors of texts."""
        exchange = embeddings.parse(await self._body(request), self._service.served)
        return Vectors(exchange, self._service, request.state)

    async def tokenize(self, request: Request) -> Response:
        """Text or messages to token ids."""
        service = self._service
        asked = tokenize.parse_tokenize(await self._body(request), service.served)
        token_ids = await service.token_ids(asked.prompt, asked.template, asked.add_special)
        return _json(await service.in_thread(asked.reply, token_ids))

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        service = self._service
        token_ids = tokenize.parse_detokenize(await self._body(request), service.served)
        return _json(tokenize.detokenize_body(await service.in_thread(service.tokenizer.decode, token_ids)))

    async def models(self, request: Request) -> Response:
        """What this server calls its model."""
        return _json(models.models_body(self._service.served))

    async def model(self, request: Request) -> Response:
        """One of these names."""
        return _json(models.model_body(self._service.served, request.path_params["model"]))

    async def openapi(self, request: Request) -> Response:
        """What there is, for programs."""
        return _json(msgspec.json.encode(openapi.openapi_document(self._service.served, __version__, OTHER_PATHS)))

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        """For the page: the model's card and live figures."""
        return _json(status_body(self._service))

    async def livez(self, request: Request) -> Response:
        """Whether this process hears requests: if not, it should be started again."""
        return _json(b'{"status":"ok"}')

    async def readyz(self, request: Request) -> Response:
        """Whether requests should be sent here: the model is loaded and makes progress."""
        if self._service.trouble is not None:
            raise EngineDownError(self._service.trouble)
        return _json(b'{"status":"ok"}')

    async def _body(self, request: Request) -> bytes:
        config = self._service.config
        return await read_body(request, config.max_body_bytes, config.body_timeout_s)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
