"""OpenAI-style API: chat completions with pictures, for any client of theirs.

YIVL_API_KEY=secret python -m yivl.serve.api
"""

import asyncio
import hmac
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from yivl import command_line
from yivl.errors import ContextLengthError, ImageError, YiVLError
from yivl.inference.chat import GenerationState
from yivl.serve import scheduler as serving
from yivl.serve.limits import Limits
from yivl.serve.messages import Asked, read_messages
from yivl.serve.remote import Fetcher
from yivl.serve.scheduler import Overloaded, Scheduler
from yivl.serve.schema import (
    FINISH_REASONS,
    AnswerMessage,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    ErrorBody,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Usage,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DEFAULT_TOKENS: Final = 1024  # of an answer, where a request does not say. Source: 01-ai/Yi, VL/single_inference.py
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}

_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer; with `stream`, its pieces as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


class APIError(Exception):
    """A response that is an error, in words that say nothing about the inside of the server."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=_TYPES.get(status, "server_error"), param=param, code=code)

    def response(self) -> Response:
        """Return it as HTTP."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}}
        return JSONResponse(ErrorResponse(error=self.body).model_dump(), self.status, headers=headers.get(self.status))


def as_api_error(error: Exception) -> APIError:
    """Return what a client is told about an error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        return APIError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, ImageError):
        return APIError(400, str(error), code="invalid_image", param="messages")
    if isinstance(error, YiVLError):
        return APIError(400, str(error))
    if isinstance(error, Overloaded):
        return APIError(429, "too many requests are waiting; try again in a while", code="overloaded")
    if isinstance(error, TimeoutError):
        return APIError(504, "the answer took too long; ask for fewer tokens", code="timeout")
    if command_line.is_out_of_memory(error):
        return APIError(503, "not enough memory for this request; try again, or ask with less", code="out_of_memory")
    return APIError(500, "the server failed to answer")


class Metrics:
    """What ``/metrics`` tells, of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        make = partial(Counter, registry=self.registry)
        self.responses = make("yivl_responses", "HTTP responses", ["path", "status"])
        self.prompt_tokens = make("yivl_prompt_tokens", "Positions of prompts, patches of pictures included")
        self.completion_tokens = make("yivl_completion_tokens", "Tokens generated")
        self.first_token = Histogram("yivl_first_token_seconds", "Until an answer began", registry=self.registry)
        self.seconds = Histogram("yivl_answer_seconds", "Until an answer ended", registry=self.registry)
        for name, about, value in (
            ("yivl_waiting", "Requests in the queue", lambda: scheduler.num_waiting),
            ("yivl_running", "Answers being generated", lambda: scheduler.num_running),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)

    def count(self, reply: GenerationState) -> None:
        """Add a finished answer."""
        now = time.perf_counter()
        self.prompt_tokens.inc(len(reply.keys))
        self.completion_tokens.inc(len(reply.new_ids))
        self.first_token.observe((reply.first_token_at or now) - reply.start)
        self.seconds.observe(now - reply.start)


class Guard:
    """Asks every request but those for ``/health`` for the key, measures bodies, and notes every response."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, metrics: Metrics) -> None:
        self.app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, received = time.perf_counter(), 500, 0  # 500: nothing was sent, for something failed

        async def measured() -> ASGIMessage:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413)
            return message

        async def noted(message: ASGIMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = dict(scope["headers"])
        try:
            if not self._has_key(scope["path"], headers.get(b"authorization", b"")):
                await APIError(401, "a valid API key is needed").response()(scope, receive, noted)
            elif int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
                await _http_error(413).response()(scope, receive, noted)
            else:
                await self.app(scope, measured, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(path, status).inc()
            _log("response", path=path, status=status, seconds=round(time.perf_counter() - start, 3))

    def _has_key(self, path: str, authorization: bytes) -> bool:
        if self._key is None or path == "/health":
            return True
        return hmac.compare_digest(self._key, authorization)


class Exchange:
    """The answers to one request, as the scheduler's thread tells of them to the event loop."""

    def __init__(self, asked: Asked, body: ChatRequest, limits: Limits, deadline: float) -> None:
        self.requests: list[serving.Request] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | GenerationState | Exception]] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._deadline = deadline
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        for index in range(body.n):
            self.requests.append(
                serving.Request(
                    turns=asked.turns,
                    images=asked.images,
                    question=asked.question,
                    system=asked.system,
                    sampling=_sampling(body, limits, index),
                    stops=[stop for stop in stops if stop],
                    tell=partial(self._tell, index),
                    cancelled=self._cancelled,
                )
            )

    def _tell(self, index: int, event: str | GenerationState | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed, and nobody is there to be told
            self.cancel()

    async def events(self) -> AsyncIterator[tuple[int, str | GenerationState]]:
        """Yield pieces of text and finished replies, each with the number of its answer.

        Raises:
            APIError: If an answer fails or takes too long.
        """
        going_on = len(self.requests)
        while going_on:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, event = await self._events.get()
            except TimeoutError as error:
                raise as_api_error(error) from error
            if isinstance(event, Exception):
                raise as_api_error(event) from event
            going_on -= isinstance(event, GenerationState)
            yield index, event

    def cancel(self) -> None:
        """Say that nobody wants the answers any more."""
        self._cancelled.set()


def build_app(
    scheduler: Scheduler, limits: Limits, *, api_key: str | None = None, remote_hosts: tuple[str, ...] = ()
) -> FastAPI:
    """Return the API of a running scheduler, which is closed with it.

    Args:
        scheduler: What answers.
        limits: Of requests.
        api_key: What clients must send as a bearer token, or ``None``.
        remote_hosts: Hosts that pictures may be fetched from.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(scheduler.close)

    app = FastAPI(
        title="yivl",
        description="Chat completions with pictures, in OpenAI's form.",
        lifespan=lifespan,
        openapi_url="/openapi.json",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
    )
    metrics = Metrics(scheduler)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=limits.max_body_bytes, metrics=metrics)
    _add_error_handlers(app)
    fetcher = Fetcher(remote_hosts, limits.max_image_bytes)
    started, readers = int(time.time()), anyio.CapacityLimiter(limits.max_batch)

    @app.get("/health")
    async def health() -> Health:
        """Say that the server is there."""
        return Health()

    @app.get("/metrics", responses={401: {"model": ErrorResponse}})
    async def show_metrics() -> Response:
        """Return metrics as Prometheus reads them."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={401: {"model": ErrorResponse}})
    async def models() -> ModelList:
        """List the one model."""
        return ModelList(data=[ModelCard(id=scheduler.loaded.name, created=started, owned_by="yivl")])

    @app.post("/v1/chat/completions", response_model=Completion, responses=_ERRORS | _STREAM)
    async def complete(body: ChatRequest, request: Request) -> Any:
        """Answer the last message of a conversation."""
        if body.model != scheduler.loaded.name:
            message = f"there is no such model; this server has {scheduler.loaded.name}"
            raise APIError(404, message, code="model_not_found", param="model")
        if body.n > limits.max_choices:
            raise APIError(400, f"n is at most {limits.max_choices}", param="n")
        if scheduler.is_full:
            raise Overloaded
        deadline = asyncio.get_running_loop().time() + limits.max_seconds
        read = partial(read_messages, body.messages, limits, fetcher, scheduler.loaded.image_processor)
        async with asyncio.timeout_at(deadline):
            asked = await anyio.to_thread.run_sync(read, limiter=readers, abandon_on_cancel=True)
        exchange = Exchange(asked, body, limits, deadline)
        scheduler.submit(exchange.requests)
        label = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": scheduler.loaded.name}
        if body.stream:
            return await _stream(exchange, body, label, metrics, request)
        return await _whole(exchange, label, metrics, request)

    return app


async def _whole(exchange: Exchange, label: dict[str, Any], metrics: Metrics, request: Request) -> Completion:
    async def collect() -> dict[int, GenerationState]:
        return {index: event async for index, event in exchange.events() if isinstance(event, GenerationState)}

    replies = await _unless_left(collect(), exchange, request)
    choices = [
        Choice(
            index=index,
            message=AnswerMessage(content=reply.text),
            finish_reason=FINISH_REASONS[reply.finish_reason or "length"],
        )
        for index, reply in sorted(replies.items())
    ]
    return Completion(**label, choices=choices, usage=_end(list(replies.values()), metrics))


async def _stream(
    exchange: Exchange, body: ChatRequest, label: dict[str, Any], metrics: Metrics, request: Request
) -> Response:
    """Return a response of server-sent events; it begins with the first event, so that errors before have a status."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    events = exchange.events()
    first = await _unless_left(anext(events), exchange, request)

    async def pieces() -> AsyncIterator[str]:
        replies: list[GenerationState] = []

        def choice(index: int, delta: Delta, reply: GenerationState | None = None) -> str:
            reason = FINISH_REASONS[reply.finish_reason or "length"] if reply else None
            chunk = Chunk(**label, choices=[ChunkChoice(index=index, delta=delta, finish_reason=reason)])
            # Of a delta, what is not there is left out; of a chunk, clients expect every field.
            fields = chunk.model_dump() if with_usage else chunk.model_dump(exclude={"usage"})
            fields["choices"][0]["delta"] = delta.model_dump(exclude_none=True)
            return _event(fields)

        try:
            for index in range(body.n):
                yield choice(index, Delta(role="assistant", content=""))
            index, event = first
            while True:
                if isinstance(event, GenerationState):
                    replies.append(event)
                    yield choice(index, Delta(), event)
                else:
                    yield choice(index, Delta(content=event))
                try:
                    index, event = await anext(events)
                except StopAsyncIteration:
                    break
            usage = _end(replies, metrics)
            if with_usage:
                yield _event(Chunk(**label, choices=[], usage=usage).model_dump())
            yield "data: [DONE]\n\n"
        except APIError as error:
            yield _event(ErrorResponse(error=error.body).model_dump())
        finally:
            exchange.cancel()

    return StreamingResponse(pieces(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _unless_left(work: Awaitable[T], exchange: Exchange, request: Request) -> T:
    """Return the result of the work; if the client leaves or the work fails, the answers are cancelled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(499, "the client has left")
        return working.result()
    except BaseException:
        exchange.cancel()
        raise
    finally:
        working.cancel()
        leaving.cancel()


def _end(replies: list[GenerationState], metrics: Metrics) -> Usage:
    """Return what the answers took, and note it; nothing that a client wrote goes into the log."""
    for reply in replies:
        metrics.count(reply)
    prompt_tokens, completion_tokens = len(replies[0].keys), sum(len(reply.new_ids) for reply in replies)
    _log(
        "answer",
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        finish_reasons=[reply.finish_reason for reply in replies],
    )
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def _sampling(body: ChatRequest, limits: Limits, index: int) -> dict[str, Any]:
    """Return the fields of ``Sampling``; of several answers with a seed each gets one of its own."""
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted and wanted > limits.max_tokens:
        raise APIError(400, f"an answer may have at most {limits.max_tokens} tokens", param="max_tokens")
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0,  # OpenAI's API has none
        "max_new_tokens": wanted or min(_DEFAULT_TOKENS, limits.max_tokens),
        "seed": None if body.seed is None else (body.seed + index) % 2**63,
    }


def _add_error_handlers(app: FastAPI) -> None:
    async def respond(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, str) or part.isidentifier())
        unknown = first["type"] == "extra_forbidden"
        message = "this parameter is not supported" if unknown else str(first["msg"])
        return APIError(400, f"{place}: {message}" if place else message, param=place or None).response()

    async def name(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_error(error.status_code).response()

    for kind in (APIError, YiVLError, Overloaded, TimeoutError, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(HTTPException, name)


def _http_error(status: int) -> APIError:
    texts = {404: "there is nothing here", 405: "not with this method", 413: "the request is too large"}
    return APIError(status, texts.get(status, "the request cannot be read"))


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def _log(event: str, **fields: Any) -> None:
    logger.info("%s", json.dumps({"time": round(time.time(), 3), "event": event, **fields}))


def main() -> None:
    """Load a model and serve it."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--allow-remote-images", nargs="+", default=(), metavar="HOST", help="hosts that pictures may be fetched from"
    )
    Limits.add_flags(parser, "api")
    arguments = parser.parse_args()
    limits, api_key = Limits.from_flags(arguments), os.environ.get("YIVL_API_KEY")
    loaded = command_line.load(arguments)
    if api_key is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "anybody who reaches %s:%d can use this server; set YIVL_API_KEY", arguments.host, arguments.port
        )
    app = build_app(
        Scheduler(loaded, limits), limits, api_key=api_key, remote_hosts=tuple(arguments.allow_remote_images)
    )
    logger.info("http://%s:%d/v1 answers as %s", arguments.host, arguments.port, loaded.name)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=limits.shutdown_seconds,
        server_header=False,
    )


def console() -> None:
    """Run as the console command."""
    command_line.run(main)


if __name__ == "__main__":
    console()
