"""The one thread that owns an ``Engine``: the API and the page queue requests here and are answered in one batch."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.errors import YiVLError
from yivl.inference.chat import GenerationState
from yivl.inference.engine import Engine
from yivl.serve.limits import Limits

logger = logging.getLogger(__name__)

Event = str | GenerationState | Exception
"""A piece of text; or, as the last event of a request, the finished state or an error."""


class Overloaded(Exception):  # noqa: N818 (a state of the server, not a fault)
    """The queue is full, or the server is shutting down."""


class Cancelled(Exception):  # noqa: N818 (what the client asked for)
    """The request was cancelled while it was queued."""


@dataclass(eq=False)
class Request:
    """A question to be answered. All callables run in the scheduler's thread."""

    begin: Callable[[], GenerationState]
    """Encodes the images and returns the state."""
    on_event: Callable[[Event], None]
    """Receives the events; must not block."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it to end the answer; it is the ``stop_event`` of the state, too."""


class Scheduler:
    """Answers requests with one model, several in one batch; no other thread may use the model."""

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self.loaded = loaded
        self._limits = limits
        self._queue: list[Request] = []
        self._running: list[tuple[Request, GenerationState]] = []
        self._engine = Engine(loaded)
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Queued requests, without the cancelled ones."""
        return sum(not request.cancelled.is_set() for request in self._queue)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether a request would be refused now."""
        return self._is_closed or self.num_waiting >= self._limits.max_queue

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all requests or none.

        Raises:
            Overloaded: If they do not fit, or the scheduler is closed.
        """
        with self._changed:
            if self._is_closed or self.num_waiting + len(requests) > self._limits.max_queue:
                raise Overloaded
            self._queue = [*self._queue, *requests]  # never changed in place: other threads read it without the lock
            self._changed.notify()

    def close(self) -> None:
        """Fail all requests with ``Overloaded`` and wait for the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._queue or self._running)
                if self._is_closed:
                    break
                cancelled = [request for request in self._queue if request.cancelled.is_set()]
                waiting = [request for request in self._queue if request not in cancelled]
                free = self._limits.max_batch - len(self._running)
                self._queue = waiting[free:]
            for request in cancelled + waiting[:free]:
                self._join(request)
            try:
                self._deliver(self._engine.step())
            except Exception as error:
                self._fail_batch(error)
        self._fail_batch(Overloaded())
        for request in self._queue:
            request.on_event(Overloaded())
        self._queue = []

    def _join(self, request: Request) -> None:
        """Prefill the prompt of one request, unless it was cancelled; an error here does not affect the others."""
        try:
            if request.cancelled.is_set():
                raise Cancelled
            state = request.begin()
            self._running.append((request, state))
            self._deliver([(state, self._engine.add(state))])
        except Exception as error:
            self._running = [pair for pair in self._running if pair[0] is not request]
            self._fail(request, error)

    def _deliver(self, pieces: Sequence[tuple[GenerationState, str]]) -> None:
        texts = {id(state): text for state, text in pieces}
        for request, state in list(self._running):
            if text := texts.get(id(state)):
                request.on_event(text)
            if state.finish_reason:
                self._running.remove((request, state))
                request.on_event(state)

    def _fail_batch(self, error: Exception) -> None:
        self._engine.clear()
        failed, self._running = self._running, []
        for request, _ in failed:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, YiVLError | Overloaded | Cancelled):
            # The traceback holds no text of the request; out of memory is expected under load.
            logger.error("an answer failed", exc_info=None if is_out_of_memory(error) else error)
        request.on_event(error)
