"""The FastAPI application of the API: its paths, in OpenAI's form."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import anyio
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from yivl.inference.chat import check_length
from yivl.serve.api_errors import APIError, add_error_handlers
from yivl.serve.completions import Exchange
from yivl.serve.guard import Guard
from yivl.serve.images import ImageReader
from yivl.serve.limits import Limits
from yivl.serve.messages import has_remote_images, read_messages, text_of
from yivl.serve.metrics import Metrics
from yivl.serve.remote import Fetcher
from yivl.serve.scheduler import Overloaded, Scheduler
from yivl.serve.schema import ChatRequest, Completion, ErrorResponse, Health, ModelCard, ModelList

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
_UNAUTHORIZED: Final[dict[int | str, dict[str, Any]]] = {401: _ERRORS[401]}
# Each event of a stream. Source: OpenAPI 3.2, sequential media types; earlier tools ignore it.
_EVENT: Final = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer; with `stream`, its pieces as server-sent events",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
}


def build_app(
    scheduler: Scheduler, limits: Limits, *, api_key: str | None = None, remote_hosts: tuple[str, ...] = ()
) -> FastAPI:
    """Return the API of a running scheduler; closing the application closes the scheduler.

    Clients must send ``api_key`` as a bearer token, unless it is ``None``. Images may be fetched from ``remote_hosts``.
    """
    app = FastAPI(
        title="yivl",
        description="Chat completions with images, in OpenAI's form.",
        lifespan=partial(_close_at_exit, scheduler),
        openapi_url="/openapi.json",
        docs_url=None,  # these pages would load scripts from other hosts
        redoc_url=None,
    )
    metrics, name = Metrics(scheduler), scheduler.loaded.name
    card = ModelCard(id=name, created=int(time.time()), owned_by="yivl")
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=metrics)
    add_error_handlers(app)
    read = partial(
        read_messages,
        limits=limits,
        fetcher=Fetcher(remote_hosts, limits.max_image_bytes),
        reader=ImageReader(limits, scheduler.loaded.image_processor),
    )
    # Slow hosts of images must not keep requests without such images waiting.
    readers, fetchers = (anyio.CapacityLimiter(limits.max_batch) for _ in range(2))

    @app.get("/health")
    async def health() -> Health:
        """Report that the server is up."""
        return Health()

    @app.get("/metrics", responses=_UNAUTHORIZED)
    async def show_metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=_UNAUTHORIZED)
    @app.get("/v1/models/", include_in_schema=False)  # otherwise the model with an empty id
    async def models() -> ModelList:
        """List the one model."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses=_UNAUTHORIZED | {404: _ERRORS[404]})
    async def retrieve_model(model: str) -> ModelCard:
        """Return the model by its id, which may contain slashes."""
        _check_model(model, name)
        return card

    @app.post("/v1/chat/completions", response_model=Completion, responses=_ERRORS | _STREAM)
    async def complete(body: ChatRequest, request: Request) -> Any:
        """Answer the last message of a conversation."""
        _check(body, scheduler, limits)
        deadline = asyncio.get_running_loop().time() + limits.max_seconds
        exchange = Exchange(body, limits, scheduler, deadline, metrics)
        limiter = fetchers if has_remote_images(body.messages) else readers
        async with asyncio.timeout_at(deadline):
            prompt = await anyio.to_thread.run_sync(read, body.messages, limiter=limiter, abandon_on_cancel=True)
        exchange.submit(*prompt)
        return await (exchange.stream(request) if body.stream else exchange.complete(request))

    return app


@asynccontextmanager
async def _close_at_exit(scheduler: Scheduler, _: FastAPI) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(scheduler.close)


def _check(body: ChatRequest, scheduler: Scheduler, limits: Limits) -> None:
    """Refuse a request before its images are read."""
    _check_model(body.model, scheduler.loaded.name)
    if body.n > limits.max_choices:
        raise APIError(400, f"n is at most {limits.max_choices}", param="n")
    check_length(sum(len(text_of(message)) for message in body.messages), scheduler.loaded)
    if scheduler.is_full:
        raise Overloaded


def _check_model(wanted: str, served: str) -> None:
    if wanted != served:
        message = f"there is no such model; this server has {served}"
        raise APIError(404, message, code="model_not_found", param="model")
