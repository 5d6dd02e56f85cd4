"""The web page at `/`: files that come with the package, the same for everybody, and never one from elsewhere."""

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/style.css": ("style.css", "text/css; charset=utf-8"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
} | {
    f"/web/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
    for name in ("app", "chat", "markdown", "plots", "server", "settings")
}

PATHS = tuple(_FILES)
"""What is open to everybody."""

_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


def routes() -> list[Route]:
    """One for each file, read now."""
    return [_route(path, name, media_type) for path, (name, media_type) in _FILES.items()]


def _route(path: str, name: str, media_type: str) -> Route:
    content = files("strop.serve").joinpath("web", name).read_bytes()
    headers = {
        "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "cache-control": "no-cache",  # kept, but asked about each time: after an upgrade no old part meets a new one
        "content-security-policy": _POLICY,
        "referrer-policy": "no-referrer",
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return Route(path, answer, methods=["GET"])
