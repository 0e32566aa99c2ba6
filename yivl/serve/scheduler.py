"""One thread that answers the requests of all clients together.

Requests wait in order. Between two steps of the batch those that fit join it; answers go back through callbacks.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.constants import SYSTEM_PROMPT
from yivl.conversation import Turn
from yivl.errors import YiVLError
from yivl.inference.chat import Chat, EncodedImage, GenerationState
from yivl.inference.engine import Engine
from yivl.serve.limits import Limits

logger = logging.getLogger(__name__)


class Overloaded(Exception):  # noqa: N818 (no mistake of anybody)
    """The queue is full, or the server is shutting down."""


@dataclass(frozen=True, eq=False)
class SentImage:
    """A picture of a request."""

    pixel_values: torch.Tensor
    """``(3, image_size, image_size)``: what waits is small, however large the picture was."""
    digest: bytes
    """Of the bytes it came as: the same picture is encoded once."""


@dataclass(eq=False)
class Request:
    """A conversation that waits for its next answer."""

    turns: Sequence[Turn]
    """Answered turns, oldest first."""
    images: Sequence[Sequence[SentImage]]
    """Of each of these turns, and of the question."""
    question: str
    sampling: dict[str, Any]
    tell: Callable[[str | GenerationState | Exception], None]
    """Gets pieces of text, then the finished reply or an error. Called in the scheduler's thread; must not block."""
    system: str = SYSTEM_PROMPT
    stops: Sequence[str] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it when nobody wants the answer any more."""


class Scheduler:
    """Answers requests with one model, several at once.

    Args:
        loaded: The model, which no other thread may use.
        limits: How many requests are answered at once, and how many may wait.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self.loaded = loaded
        self._limits = limits
        self._waiting: deque[Request] = deque()
        self._running: list[tuple[Request, GenerationState]] = []
        self._batch = Engine(loaded)
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that no step has answered yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether a request would be refused now."""
        return (
            self._is_closed or sum(not one.cancelled.is_set() for one in list(self._waiting)) >= self._limits.max_queue
        )

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none.

        Raises:
            Overloaded: If they do not fit, or the scheduler is closed.
        """
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled.is_set())
            if self._is_closed or len(self._waiting) + len(requests) > self._limits.max_queue:
                raise Overloaded
            self._waiting += requests
            self._changed.notify()

    def close(self) -> None:
        """End all answers, refuse all requests, and wait for the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting or self._running)
                if self._is_closed:
                    break
                free = self._limits.max_batch - len(self._running)
                joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            for request in joining:
                self._join(request)
            try:
                self._deliver(self._batch.step())
            except Exception as error:
                self._fail_all(error)
        self._fail_all(Overloaded())
        for request in self._waiting:
            request.tell(Overloaded())
        self._waiting.clear()

    def _join(self, request: Request) -> None:
        """Compute the prompt of a request; what is wrong with it concerns nobody else."""
        if request.cancelled.is_set():
            return
        try:
            reply = self._begin(request)
            self._running.append((request, reply))
            self._deliver(self._batch.add([reply]))
        except Exception as error:
            self._running = [pair for pair in self._running if pair[0] is not request]
            self._report(request, error)

    def _begin(self, request: Request) -> GenerationState:
        chat = Chat(self.loaded, system=request.system)
        *earlier, shown = [[self._encode(chat, image) for image in group] for group in request.images]
        chat.restore(request.turns, earlier)
        return chat.begin(
            request.question, shown, stop_event=request.cancelled, stops=request.stops, **request.sampling
        )

    def _encode(self, chat: Chat, sent: SentImage) -> EncodedImage:
        encoded = self._images.pop(sent.digest, None) or chat.encode(sent.pixel_values)
        self._images[sent.digest] = encoded
        while len(self._images) > self._limits.max_encoded_images:
            self._images.popitem(last=False)
        return encoded

    def _deliver(self, pieces: Sequence[tuple[GenerationState, str]]) -> None:
        texts = {id(reply): text for reply, text in pieces}
        for request, reply in list(self._running):
            if text := texts.get(id(reply)):
                request.tell(text)
            if reply.finish_reason:
                self._running.remove((request, reply))
                request.tell(reply)

    def _fail_all(self, error: Exception) -> None:
        self._batch.clear()
        failed, self._running = self._running, []
        for request, _ in failed:
            self._report(request, error)

    def _report(self, request: Request, error: Exception) -> None:
        if not isinstance(error, YiVLError | Overloaded):
            # The traceback holds no text of the request; a lack of memory is expected to happen.
            logger.error("an answer failed", exc_info=None if is_out_of_memory(error) else error)
        request.tell(error)
