"""The one thread that owns an ``Engine``: the API and the page queue requests here and are answered in one batch."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.errors import NonFiniteError, YiVLError
from yivl.inference.engine import Engine, Prefill
from yivl.inference.kv_cache import PrefixStore
from yivl.inference.request import EncodedImage, GenerationState
from yivl.serve.images import ImageEncoder, SentImage
from yivl.serve.limits import Limits

logger = logging.getLogger(__name__)

Event = str | GenerationState | Exception
"""A piece of text; or, as the last event of a request, the finished state or an error."""


class Overloaded(Exception):  # noqa: N818 (a state of the server, not a fault)
    """The queue is full."""


class ShuttingDown(Overloaded):
    """The scheduler is closed."""


class Cancelled(Exception):  # noqa: N818 (what the client asked for)
    """The request was cancelled while it was queued."""


@dataclass(eq=False)
class Request:
    """A question to be answered. All callables run in the scheduler's thread."""

    images: Sequence[SentImage]
    """The images to be encoded."""
    begin: Callable[[Sequence[EncodedImage]], GenerationState]
    """Returns the state, given the features of the images."""
    on_event: Callable[[Event], None]
    """Receives the events; must not block."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it to end the answer; it is the ``stop_event`` of the state, too."""
    start: float = field(default_factory=time.perf_counter)
    """``time.perf_counter()`` of the creation, in seconds."""


@dataclass(eq=False)
class _Joining:
    """A request whose images are encoded, or whose prompt is computed."""

    request: Request
    encoded: list[EncodedImage] = field(default_factory=list)
    """The features of the first of its images, or of all."""
    prefill: Prefill | None = None
    is_retried: bool = False
    """Whether memory ran out before, and the stored prefixes were dropped for this request."""

    @property
    def pending_images(self) -> Sequence[SentImage]:
        return self.request.images[len(self.encoded) :]


class Scheduler:
    """Answers requests with one model, several in one batch; no other thread may use the model.

    Between two decoding steps of the batch at most one part of the queued prompts is computed, or one batch of images
    is encoded, so that running answers are not interrupted for long.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self.loaded = loaded
        self._limits = limits
        self._queue: list[Request] = []
        self._joining: list[_Joining] = []
        self._running: list[tuple[Request, GenerationState]] = []
        self._encoder = ImageEncoder(loaded.model, limits.max_encoded_images)
        self._engine = Engine(loaded, PrefixStore(limits.max_cache_bytes))
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
        """Requests whose images are encoded, whose prompts are computed, or that are decoded."""
        return len(self._joining) + len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether a request would be refused now."""
        return self.num_waiting >= self._limits.max_queue

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all requests or none.

        Raises:
            Overloaded: If they do not fit.
            ShuttingDown: If the scheduler is closed.
        """
        with self._changed:
            if self._is_closed:
                raise ShuttingDown
            if self.num_waiting + len(requests) > self._limits.max_queue:
                raise Overloaded
            self._queue = [*self._queue, *requests]  # never changed in place: other threads read it without the lock
            self._changed.notify()

    def close(self) -> None:
        """Fail all requests with ``ShuttingDown`` and wait for the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._queue or self.num_running)
                if self._is_closed:
                    break
                cancelled = [request for request in self._queue if request.cancelled.is_set()]
                waiting = [request for request in self._queue if request not in cancelled]
                free = self._limits.max_batch - self.num_running
                self._joining += map(_Joining, waiting[:free])
                self._queue = waiting[free:]
            for request in cancelled:
                self._fail(request, Cancelled())
            try:
                self._compute_prompts()
                self._deliver(self._engine.step())
            except Exception as error:
                self._fail_batch(error)
        self._fail_batch(ShuttingDown())
        for request in [one.request for one in self._joining] + self._queue:
            self._fail(request, ShuttingDown())
        self._joining, self._queue = [], []

    def _compute_prompts(self) -> None:
        """Compute prompts, the oldest first, until running answers need their next token."""
        for one in [one for one in self._joining if one.request.cancelled.is_set()]:
            self._joining.remove(one)
            self._fail(one.request, Cancelled())
        remaining = self._limits.prefill_chunk
        while self._joining and remaining > 0:
            one = self._joining[0]
            try:
                if pending := self._pending_images():
                    if remaining == self._limits.prefill_chunk:  # after a part of a prompt it would be a long wait
                        self._encode(pending)
                    return
                num_computed, joined = self._advance(one, remaining)
            except Exception as error:  # it does not affect the other requests
                if is_out_of_memory(error) and not one.is_retried and self._engine.free_memory():
                    one.prefill, one.is_retried = None, True
                else:
                    self._joining.remove(one)
                    self._fail(one.request, error)
                continue
            remaining -= num_computed
            if joined is not None:
                state, text = joined
                self._joining.remove(one)
                self._running.append((one.request, state))
                self._deliver([(state, text)])

    def _advance(self, one: _Joining, remaining: int) -> tuple[int, tuple[GenerationState, str] | None]:
        """Compute a part of a prompt.

        Returns:
            The number of its positions, and after the last part the state and the text of the first token.
        """
        one.prefill = prefill = one.prefill or self._start(one)
        before = prefill.num_remaining
        # A whole prompt takes less time than its parts; while no answer runs, none is interrupted by it.
        text = self._engine.advance(prefill, remaining if self._running else before)
        return before - prefill.num_remaining, None if text is None else (prefill.state, text)

    def _pending_images(self) -> list[tuple[_Joining, SentImage]]:
        """Return the images to encode, each with its request; none if the oldest joining request needs none."""
        for one in self._joining:
            while one.pending_images and (found := self._encoder.find(one.pending_images[0])):
                one.encoded.append(found)
        if not self._joining[0].pending_images:
            return []
        return [(one, image) for one in self._joining for image in one.pending_images]

    def _encode(self, pending: Sequence[tuple[_Joining, SentImage]]) -> None:
        """Encode the first of the images, as many in one batch as a part of a prompt has positions for."""
        batch = pending[: max(1, self._limits.prefill_chunk // self.loaded.model.config.num_patches)]
        try:
            features = self._encoder.encode([image for _, image in batch])
        except Exception:
            if len(batch) == 1:
                raise
            batch = batch[:1]  # the cause may be another request, or the size of the batch
            features = self._encoder.encode([image for _, image in batch])
        for (one, _), encoded in zip(batch, features, strict=True):
            one.encoded.append(encoded)

    def _start(self, one: _Joining) -> Prefill:
        state = one.request.begin(one.encoded)
        state.start = one.request.start
        return self._engine.start(state)

    def _deliver(self, pieces: Sequence[tuple[GenerationState, str]]) -> None:
        texts = {id(state): text for state, text in pieces}
        for request, state in list(self._running):
            try:
                if text := texts.get(id(state)):
                    request.on_event(text)
                if state.finish_reason:
                    self._running.remove((request, state))
                    if state.error is not None:
                        self._fail(request, state.error)
                    else:
                        request.on_event(state)
            except Exception as error:  # it does not affect the other requests
                self._running = [one for one in self._running if one[0] is not request]
                self._engine.remove([state])
                self._fail(request, error)

    def _fail_batch(self, error: Exception) -> None:
        self._engine.clear()
        failed, self._running = self._running, []
        for request, _ in failed:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, NonFiniteError):
            logger.error("an answer failed: %s", error)
        elif not isinstance(error, YiVLError | Overloaded | Cancelled):
            # The traceback holds no text of the request; out of memory is expected under load.
            logger.error("an answer failed", exc_info=None if is_out_of_memory(error) else error)
        if is_out_of_memory(error):
            self._engine.free_memory()
        try:
            request.on_event(error)
        except Exception:
            logger.exception("an error could not be delivered")
