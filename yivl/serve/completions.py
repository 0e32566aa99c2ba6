"""The answers to one API request, from the scheduler's thread to a JSON body or a stream of server-sent events."""

import asyncio
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.background import BackgroundTask

from yivl.conversation import Turn
from yivl.inference.chat import Chat
from yivl.inference.request import EncodedImage, GenerationState
from yivl.inference.sampling import Sampling
from yivl.serve import scheduler as serving
from yivl.serve.api_errors import APIError, as_api_error
from yivl.serve.images import SentImage
from yivl.serve.limits import Limits
from yivl.serve.metrics import Metrics, log
from yivl.serve.scheduler import Scheduler
from yivl.serve.schema import AnswerMessage, ChatRequest, Choice, Completion, ErrorResponse, FinishReason, Usage

T = TypeVar("T")

_DEFAULT_TOKENS: Final = 1024  # of an answer. Source: 01-ai/Yi, VL/openai_api.py


class Exchange:
    """One request and its ``n`` answers; ``deadline`` is on the clock of the event loop, in seconds."""

    def __init__(
        self, body: ChatRequest, limits: Limits, scheduler: Scheduler, deadline: float, metrics: Metrics
    ) -> None:
        self._body = body
        self._scheduler = scheduler
        self._deadline = deadline
        self._metrics = metrics
        self._sampling = [_sampling(body, limits, index) for index in range(body.n)]
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, serving.Event]] = asyncio.Queue()
        self._cancelled = threading.Event()

    def submit(self, system: str | None, turns: Sequence[Turn], images: Sequence[Sequence[SentImage]]) -> None:
        """Queue the request ``n`` times.

        Raises:
            Overloaded: If the queue is full.
        """
        given = [self._body.stop] if isinstance(self._body.stop, str) else self._body.stop or []
        stops = [stop for stop in given if stop]

        def begin(sampling: dict[str, Any], encoded: Sequence[EncodedImage]) -> GenerationState:
            chat, remaining = Chat(self._scheduler.loaded, system=system), iter(encoded)
            *earlier, shown = [[next(remaining) for _ in group] for group in images]
            chat.restore(turns[:-1], earlier)
            return chat.begin(turns[-1].question, shown, stop_event=self._cancelled, stops=stops, **sampling)

        flat = [image for group in images for image in group]
        self._scheduler.submit(
            [
                serving.Request(flat, partial(begin, sampling), partial(self._put, index), self._cancelled)
                for index, sampling in enumerate(self._sampling)
            ]
        )

    async def complete(self, request: Request) -> Completion:
        """Return all answers once they are finished."""

        async def collect() -> dict[int, GenerationState]:
            return {index: event async for index, event in self._answers() if isinstance(event, GenerationState)}

        states = await self._unless_disconnected(collect(), request)
        choices = [
            Choice(index=index, message=AnswerMessage(content=state.text), finish_reason=_finish_reason(state))
            for index, state in sorted(states.items())
        ]
        usage = self._usage(list(states.values()))
        return Completion(id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage)

    async def stream(self, request: Request) -> Response:
        """Return the stream; it begins with the first event, so that an error before it has a status of its own."""
        answers = self._answers()
        first = await self._unless_disconnected(anext(answers), request)
        # FastAPI's response, not sse-starlette's: that one cuts off running streams on SIGTERM, and importing it
        # patches uvicorn.
        # A generator that was never started runs no `finally`: the task is for a client that left before the response.
        return EventSourceResponse(
            self._chunks(first, answers), headers={"Cache-Control": "no-cache"}, background=BackgroundTask(self._cancel)
        )

    async def _cancel(self) -> None:
        self._cancelled.set()

    async def _chunks(
        self, event: tuple[int, str | GenerationState] | None, answers: AsyncIterator[tuple[int, str | GenerationState]]
    ) -> AsyncIterator[bytes]:
        states: list[GenerationState] = []
        options = self._body.stream_options
        object_ = "chat.completion.chunk"
        shared = {"id": self._id, "object": object_, "created": self._created, "model": self._body.model}
        # With include_usage every chunk has the field, and only an additional last one a value.
        usage: dict[str, Any] = {"usage": None} if options is not None and options.include_usage else {}

        def chunk(index: int, delta: dict[str, str], state: GenerationState | None = None) -> bytes:
            reason = _finish_reason(state) if state else None
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _event(shared | {"choices": [choice]} | usage)

        try:
            for index in range(self._body.n):
                yield chunk(index, {"role": "assistant", "content": ""})
            while event is not None:
                index, piece = event
                if isinstance(piece, GenerationState):
                    states.append(piece)
                    yield chunk(index, {}, piece)
                else:
                    yield chunk(index, {"content": piece})
                event = await anext(answers, None)
            counts = self._usage(states)
            if usage:
                yield _event(shared | {"choices": [], "usage": counts.model_dump()})
            yield format_sse_event(data_str="[DONE]")
        except APIError as error:
            yield _event(ErrorResponse(error=error.body).model_dump())
        finally:
            self._cancelled.set()

    def _put(self, index: int, event: serving.Event) -> None:
        if isinstance(event, str) and not self._body.stream:
            return  # the last event has the whole text
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the event loop is closed
            self._cancelled.set()

    async def _answers(self) -> AsyncIterator[tuple[int, str | GenerationState]]:
        """Yield pieces of text and finished states, each with the number of its answer.

        Raises:
            APIError: If an answer fails or takes too long.
        """
        unfinished = self._body.n
        while unfinished:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, event = await self._events.get()
            except TimeoutError as error:
                raise as_api_error(error) from error
            if isinstance(event, Exception):
                raise as_api_error(event) from event
            unfinished -= isinstance(event, GenerationState)
            yield index, event

    async def _unless_disconnected(self, work: Awaitable[T], request: Request) -> T:
        """Return the result of ``work``; if it fails or the client disconnects, the answers are cancelled."""

        async def disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise APIError(499, "the client has left")
            return working.result()
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            working.cancel()
            leaving.cancel()

    def _usage(self, states: list[GenerationState]) -> Usage:
        """Return the token counts of the finished answers, and record them."""
        for state in states:
            self._metrics.count(state)
        prompt, completion = len(states[0].keys), sum(len(state.new_ids) for state in states)
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
        reasons = [state.finish_reason for state in states]
        log("answer", prompt_tokens=prompt, completion_tokens=completion, finish_reasons=reasons)
        return usage


def _sampling(body: ChatRequest, limits: Limits, index: int) -> dict[str, Any]:
    """Return the fields of ``Sampling`` for answer ``index``; each answer has its own seed."""
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted and wanted > limits.max_tokens:
        raise APIError(400, f"an answer may have at most {limits.max_tokens} tokens", param="max_tokens")
    settings = Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        max_new_tokens=wanted or min(_DEFAULT_TOKENS, limits.max_tokens),
        seed=None if body.seed is None else (body.seed + index) % 2**63,
    )
    return dataclasses.asdict(settings)


def _finish_reason(state: GenerationState) -> FinishReason:
    """Return OpenAI's finish reason; it has none for a cancelled answer."""
    return "stop" if state.finish_reason == "stop" else "length"


def _event(fields: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(fields, ensure_ascii=False))
