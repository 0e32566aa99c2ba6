"""The middleware of the API: it checks the key, limits size and time of bodies, and records every response."""

import asyncio
import hmac
import time
from typing import Final

from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yivl.serve.api_errors import APIError, http_error
from yivl.serve.limits import Limits
from yivl.serve.memory import return_free_pages
from yivl.serve.metrics import Metrics, log

_SMALL_BODY: Final = 2**20
"""Bytes of a body that may use all of ``max_total_bytes``: text, and images as most clients send them. Source: ours."""

_SHARE_OF_LARGE: Final = 7 / 8
"""Part of ``max_total_bytes`` that larger bodies can use up, so that they cannot keep all others out. Source: ours."""


class Guard:
    """Lets a request through to the application, or answers it with an error.

    With an ``api_key`` every path but ``/health`` needs it as a bearer token.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self._api_key = api_key
        # Not a dependency of the routes: it would leave unknown paths open and run after the body has been read.
        self._bearer = HTTPBearer(auto_error=False)
        self._limits = limits
        self._held = 0  # bytes of the bodies of all requests that are received or answered
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, received = time.perf_counter(), 500, 0  # 500: nothing is sent if the application fails

        deadline: float | None = asyncio.get_running_loop().time() + self._limits.max_receive_seconds

        async def limited_receive() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408) from error
            if not message.get("more_body", False):
                deadline = None  # from here on only the end of the connection is received
            length = len(message.get("body", b""))
            received, self._held = received + length, self._held + length
            if received > self._limits.max_body_bytes:
                raise HTTPException(413)
            share = 1 if received <= _SMALL_BODY else _SHARE_OF_LARGE
            if self._held > share * self._limits.max_total_bytes:
                raise HTTPException(429)
            return message

        async def recorded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request = Request(scope)
        try:
            if not await self._is_allowed(request):
                await APIError(401, "a valid API key is needed").response()(scope, receive, recorded_send)
            elif int(request.headers.get("content-length", "0")) > self._limits.max_body_bytes:
                await http_error(413).response()(scope, receive, recorded_send)
            else:
                await self.app(scope, limited_receive, recorded_send)
        finally:
            self._held -= received
            if received > _SMALL_BODY:
                return_free_pages()
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(path, status).inc()
            log("response", path=path, status=status, seconds=round(time.perf_counter() - start, 3))

    async def _is_allowed(self, request: Request) -> bool:
        if self._api_key is None or request.url.path == "/health":
            return True
        given = await self._bearer(request)
        return given is not None and hmac.compare_digest(self._api_key.encode(), given.credentials.encode())
