"""What every request passes before a route sees it: its id, where it may come from, who sends it, and a last resort."""

import asyncio
import logging
import re
import secrets
from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from strop.core.errors import EngineDownError, OverloadError, StropError
from strop.serve.keys import KeyFile
from strop.serve.openai.errors import ApiError, as_api_error, error_body
from strop.serve.service import Service

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """ASGI middleware. Leaves `request_id`, `key_name` (None without keys) and `salt` in the scope's state."""

    def __init__(self, app: Router, service: Service, keys: KeyFile | None, open_paths: Iterable[str]) -> None:
        """open_paths: what needs no key."""
        self._app, self._service, self._keys = app, service, keys
        self._paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
        self._open_paths = frozenset(open_paths)
        # A page of a stranger's site can make a browser ask any address under a name of its own; it cannot choose Host.
        self._hosts = (
            (*_LOOPBACK, service.config.host) if service.config.host in ("127.0.0.1", "localhost", "::1") else ()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what may not pass; passes on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {}).update(request_id=request_id, key_name=None, salt=b"")
        scope["app"] = self  # without it the router answers in words of its own
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_on)
        except ClientDisconnect:
            self._service.metrics.cancelled("body")
        except HTTPException as error:  # no such route, or not with this method
            path = scope["path"]
            meant = next(filter(self._paths.__contains__, (f"/v1{path}", path.removeprefix("/v1"))), None)
            hint = "/openapi.json lists what there is" if meant in (None, path) else f"did you mean {meant}?"
            wrong = f"{scope['method']} {path!r:.200}: {error.detail}; {hint}"
            await self._refuse(scope, send_on, ApiError(wrong, status=error.status_code), error.headers)
        except Exception as error:
            if not isinstance(error, StropError):
                log.exception("a request failed", extra={"request_id": request_id})
            if status:
                raise  # the answer has begun: all that is left is to break the connection
            await self._refuse(scope, send_on, error)
        finally:
            self._service.metrics.requested(self._path(scope), status)

    async def _refuse(
        self, scope: Scope, send: Send, error: Exception, headers: Mapping[str, str] | None = None
    ) -> None:
        status = as_api_error(error).status
        if status < 500:  # probes ask an engine that loads time and again
            facts = {"request_id": scope["state"]["request_id"], "path": self._path(scope), "status": status}
            log.info("refused: %s", error, extra=facts)
        await send_error(send, error, headers)

    def _path(self, scope: Scope) -> str:
        """Strangers' paths must not become labels without end."""
        return scope["path"] if scope["path"] in self._paths else "other"

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise ApiError(
                f"Host {host!r:.80} is not this server: it listens on this machine only, unless started with --host",
                status=403,
            )
        if self._keys is not None and scope["path"] not in self._open_paths:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
            if name is None:
                raise ApiError(
                    "the API key is missing or unknown: send the header 'Authorization: Bearer KEY'",
                    status=401,
                    code="invalid_api_key",
                )
            scope["state"].update(key_name=name, salt=self._keys.salt(name))


def json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    """Of a response that is this JSON."""
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]


async def send_error(send: Send, error: Exception, more_headers: Mapping[str, str] | None = None) -> None:
    """A whole response that says what was wrong, and to official clients whether to try again."""
    body = error_body(error)
    headers = error_headers(error, body)
    headers += [(name.lower().encode(), value.encode()) for name, value in (more_headers or {}).items()]
    await send({"type": "http.response.start", "status": as_api_error(error).status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: Exception, body: bytes) -> list[tuple[bytes, bytes]]:
    """Of the response with this error in its body."""
    headers = json_headers(body)
    if isinstance(error, OverloadError):
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    elif isinstance(error, EngineDownError):
        headers.append((b"retry-after", b"2"))
    else:
        headers.append((b"x-should-retry", b"false"))
    return headers


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """A request's JSON body. ApiError for one that is too large, too slow, or not called JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):  # forms of strangers' pages never say so unasked
        raise ApiError(f"Content-Type {kind!r:.80}: send application/json", status=415)
    too_large = ApiError(f"the body is larger than {max_bytes} bytes: shorten it", status=413)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    pieces, num_bytes = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {timeout_s:.0f} s", status=408) from None
    return b"".join(pieces)
