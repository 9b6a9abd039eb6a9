"""An ASGI middleware before all paths: who may call, from where, and how much may be sent."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from uiollms.serving.settings import MIB, ApiError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
UPLOADS = "/v1/memories"
MOST_JSON = 4 * MIB  # bytes of the body of a request for an answer
MULTIPART = 64 * 1024  # bytes that a multipart body may have besides its file
# The page loads nothing from elsewhere, no other page may show it, and names are never markup.
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """With a token, every path needs it as a bearer token, except the page, which contains no data.
    Without one the server is local, and the Host header must name this machine, so that no other
    site can make its name resolve to it (DNS rebinding). A browser's Origin must be this server in
    both cases, so no other site can send it forms."""

    def __init__(self, app: Any, token: str | None, max_upload: int) -> None:
        self.app, self.max_upload = app, max_upload
        self.token = token.encode() if token else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"]}

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            self.check(scope["path"], headers)
            most = MOST_JSON
            if scope["path"].rstrip("/") == UPLOADS:
                most = self.max_upload + MULTIPART
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > most:
                raise too_large(most)
        except ApiError as error:
            response = JSONResponse(error.content, error.status, error.headers)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, counting(receive, most), send_with_headers)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self.token is None and host_name(host) not in LOCAL_NAMES:
            message = f"the Host header {host!r} does not name this machine; without a token only "
            raise ApiError(403, "wrong_host", message + ", ".join(LOCAL_NAMES) + " are accepted")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            raise ApiError(403, "wrong_origin", "requests of other sites' pages are refused")
        if self.token is not None and path != "/":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self.token) or kind.lower() != b"bearer":
                message = "the header `Authorization: Bearer TOKEN` is missing or wrong"
                raise ApiError(401, "invalid_api_key", message)


def host_name(host: str) -> str:
    """localhost:8000 -> localhost, [::1]:8000 -> ::1; "" for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def too_large(most: int) -> ApiError:
    return ApiError(413, "too_large", f"the body of the request is larger than {most:,} bytes")


class BodyTooLarge(HTTPException):
    """Raised while a body without a stated length is read. The app answers with `error`."""

    def __init__(self, most: int) -> None:
        self.error = too_large(most)
        super().__init__(413, self.error.message)


def counting(receive: Any, most: int) -> Any:
    """Wraps `receive`, so that it raises BodyTooLarge after `most` bytes."""
    received = 0

    async def wrapped() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise BodyTooLarge(most)
        return message

    return wrapped
