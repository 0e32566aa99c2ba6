"""Callbacks of the web page; ``web_layout`` has its components."""

import dataclasses
import html
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradio as gr
from gradio.data_classes import FileDataDict
from gradio.utils import get_upload_folder

from yivl.command_line import is_out_of_memory
from yivl.errors import ImageError, YiVLError
from yivl.inference.chat import Answer, Chat, EncodedImage, GenerationState, check_length
from yivl.inference.sampling import Sampling
from yivl.serve import scheduler as serving
from yivl.serve.bubbles import Bubble, as_bubbles, bubble, bubbles_up_to
from yivl.serve.images import ImageReader, SentImage
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Cancelled, Overloaded, Scheduler
from yivl.serve.sessions import Session, Sessions
from yivl.serve.transcript import as_json, as_markdown
from yivl.serve.web_texts import TEXTS, Language

TEMPERATURE, TOP_P, MAX_TOKENS = 0.2, 0.7, 512
"""Defaults of the page. Source: 01-ai/Yi, VL/web_demo.py."""

_MIN_SECONDS_BETWEEN_UPDATES: Final = 0.05  # a browser redraws no faster and would fall behind


@dataclass(frozen=True)
class Pending:
    """A question that is shown on the page and waits for its answer."""

    session: weakref.ref[Session]
    """Weak: the state of the page outlives a conversation that is closed."""
    index: int
    """The turn that it adds or replaces."""
    question: str
    stop_event: threading.Event


class Page:
    """The callbacks; the answers come from the scheduler, with those of all visitors in one batch."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.scheduler = scheduler
        self.loaded = scheduler.loaded
        self.limits = limits
        self.sessions = Sessions(self.loaded, limits)
        self._reader = ImageReader(limits, self.loaded.image_processor)

    def show_image(self, upload: dict[str, Any] | None, request: gr.Request) -> tuple[Any, list[Bubble], str]:
        """Start a conversation about another image, or without one; ``upload`` is what the browser sent."""
        try:
            if not self._show(upload, request):
                return gr.skip(), gr.skip(), gr.skip()
        except YiVLError as error:
            gr.Warning(str(error))
            return None, [], self.status()
        return gr.skip(), [], self.status()

    def _show(self, upload: dict[str, Any] | None, request: gr.Request) -> bool:
        path = None if upload is None else str(upload["path"])
        return self._session(request).show(path, self._read)

    def _read(self, path: str) -> SentImage:
        """Return the image of an upload."""
        file = Path(path).resolve()
        # A forged request can name any file; gradio checks only the fields that declare themselves files.
        if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
            raise YiVLError("this is no upload; send a file")
        if file.stat().st_size > self.limits.max_image_bytes:
            raise YiVLError(f"the image has more than {self.limits.max_image_bytes:,} bytes")
        try:
            return self._reader.read(file.read_bytes())
        except ImageError as error:
            raise YiVLError(str(error).replace("image bytes", Path(path).name, 1)) from error

    def send(
        self,
        question: str,
        upload: dict[str, Any] | None,
        bubbles: list[Bubble],
        language: Language,
        request: gr.Request,
    ) -> Any:
        """Show a question and queue it."""
        session = self._current(bubbles, language, request)
        if not question.strip():
            raise gr.Error(TEXTS[language]["no_question"], print_exception=False)
        try:
            self._show(upload, request)  # the event of a new upload may come later than the question
        except YiVLError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return "", *_queue(session, len(session.chat.turns), self._checked(question.strip()))

    def regenerate(self, bubbles: list[Bubble], language: Language, request: gr.Request) -> Any:
        """Queue the last question again."""
        session = self._current(bubbles, language, request)
        if not session.chat.turns:
            raise gr.Error(TEXTS[language]["no_turns"], print_exception=False)
        return _queue(session, len(session.chat.turns) - 1, session.chat.turns[-1].question)

    def edit(self, edit: gr.EventData, bubbles: list[Bubble], language: Language, request: gr.Request) -> Any:
        """Queue another question in place of an earlier one."""
        session = self._current(bubbles, language, request)
        try:  # not gr.EditData, whose constructor fails on a request that has other fields
            index, value = int(edit.index), str(edit.value)
        except (AttributeError, TypeError, ValueError):
            index, value = -1, ""
        if not 0 <= index < 2 * len(session.chat.turns):
            raise gr.Error(TEXTS[language]["no_turns"], print_exception=False)
        return _queue(session, index // 2, self._checked(html.unescape(value)))

    def answer(
        self,
        pending: Pending | None,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
        language: Language,
        request: gr.Request,
    ) -> Iterator[tuple[list[Bubble], str]]:
        """Stream the answer to a queued question."""
        session = self._session(request)
        # None: nothing was queued. Another session: that of the question was closed while it was queued.
        if pending is None or session is not pending.session():
            gr.Warning(TEXTS[language]["gone"])
            yield as_bubbles(session.chat), self.status()
            return
        with session.lock:
            if session.stop_event is not pending.stop_event:  # another question is shown in place of this one
                yield gr.skip(), gr.skip()
                return
            chat = session.chat
            if not pending.stop_event.is_set():
                shown = bubbles_up_to(chat, pending.index, pending.question)
                for text in self._stream(session, pending, _sampling(temperature, top_p, max_tokens, seed)):
                    if isinstance(text, Exception):
                        gr.Warning(_explain(text, language))
                    else:
                        yield [*shown, bubble("assistant", text)], gr.skip()
            yield as_bubbles(chat), self.status(chat.last_answer if chat.turns else None, language)

    def ask(
        self,
        question: str,
        image: FileDataDict | None = None,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_tokens: int = MAX_TOKENS,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer a question about an image or without one; yields the growing answer. ``gradio_client`` calls it."""
        session = Session(Chat(self.loaded))
        try:
            sampling = dataclasses.asdict(Sampling(**_sampling(temperature, top_p, max_tokens, seed)))
            if sampling["max_new_tokens"] > self.limits.max_tokens:
                raise YiVLError(f"max_tokens={max_tokens}; this server allows {self.limits.max_tokens}")
            if not question.strip():
                raise YiVLError(TEXTS["English"]["no_question"])
            if image is not None:
                session.image = self._read(image["path"])
        except YiVLError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # the client's JSON is unchecked
            raise gr.Error("an argument has the wrong type; view_api() lists them", print_exception=False) from error
        for text in self._stream(
            session, Pending(weakref.ref(session), 0, question.strip(), session.stop_event), sampling
        ):
            if isinstance(text, Exception):
                raise gr.Error(_explain(text, "English"), print_exception=False)
            yield text
        yield session.chat.turns[0].answer or ""

    def _stream(self, session: Session, pending: Pending, sampling: dict[str, Any]) -> Iterator[str | Exception]:
        """Yield the growing text of an answer, or an error; the caller holds the lock of the session until the end."""
        chat, stop_event = session.chat, pending.stop_event
        images = [] if chat.turns or session.image is None else [session.image]

        def begin(encoded: Sequence[EncodedImage]) -> GenerationState:
            if pending.index < len(chat.turns):
                return chat.begin_edit(pending.index, pending.question, stop_event=stop_event, **sampling)
            return chat.begin(pending.question, encoded, stop_event=stop_event, **sampling)

        events: queue.SimpleQueue[serving.Event] = queue.SimpleQueue()

        def receive(event: serving.Event) -> None:
            if isinstance(event, GenerationState):
                chat.finish(event)
            events.put(event)

        try:
            self.scheduler.submit([serving.Request(images, begin, receive, stop_event)])
        except Overloaded as error:
            yield error
            return
        text, updated, event = "", 0.0, events.get()
        try:
            while isinstance(event, str):
                text += event
                if time.monotonic() - updated > _MIN_SECONDS_BETWEEN_UPDATES:
                    updated = time.monotonic()
                    yield text
                event = events.get()
        finally:
            stop_event.set()
            while isinstance(event, str):  # the visitor left; until the last event the scheduler uses the chat
                event = events.get()
        if isinstance(event, Exception) and not isinstance(event, Cancelled):
            yield event

    def stop(self, request: gr.Request) -> None:
        """End the current answer, or the wait for it."""
        self._session(request).stop_event.set()

    def undo(self, bubbles: list[Bubble], language: Language, request: gr.Request) -> Any:
        """Remove the last turn and return its question to the text box."""
        session = self._current(bubbles, language, request)
        session.stop_event.set()
        with session.lock:
            turn = session.chat.undo()
            if turn is None:
                raise gr.Error(TEXTS[language]["no_turns"], print_exception=False)
            return turn.question, as_bubbles(session.chat), self.status()

    def clear(self, request: gr.Request) -> tuple[list[Bubble], str]:
        """Start a new conversation about the same image."""
        self._session(request).restart()
        return [], self.status()

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page."""
        self.sessions.drop(_key(request))

    def export(
        self, form: str, temperature: float, top_p: float, max_tokens: int, seed: int | None, request: gr.Request
    ) -> tuple[str, str]:
        """Return text and name of a file with the conversation; ``form`` is ``json`` or ``md``."""
        write = {"json": as_json, "md": as_markdown}[form]
        text = write(self._session(request).chat, _sampling(temperature, top_p, max_tokens, seed))
        return text, f"conversation.{form}"

    def status(self, answer: Answer | None = None, language: Language = "English") -> str:
        """Return the line about model, device and speed."""
        parts, texts = [f"**{self.loaded.name}**", str(self.loaded.model.device)], TEXTS[language]
        if answer is not None:
            parts.append(f"{texts['first_token']} {answer.seconds_to_first_token:.2f} s")
            parts.append(f"{answer.tokens_per_second:.1f} {texts['tokens_per_second']}")
            if answer.finish_reason == "cancelled":
                parts.append(texts["stopped"])
        return " · ".join(parts)

    def _checked(self, question: str) -> str:
        """Return a question that is not too long; a longer one would be sent to the browser with every update."""
        try:
            check_length(len(question), self.loaded)
        except YiVLError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return question

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.get(_key(request))

    def _current(self, bubbles: list[Bubble], language: Language, request: gr.Request) -> Session:
        """Return the session if it still holds what the page shows."""
        session = self._session(request)
        if bubbles and not session.chat.turns:
            raise gr.Error(TEXTS[language]["gone"], print_exception=False)
        return session


def _explain(error: Exception, language: Language) -> str:
    """Return what the visitor is told; the scheduler has logged the error."""
    if isinstance(error, YiVLError):
        return str(error)
    if isinstance(error, Overloaded):
        return TEXTS[language]["busy"]
    return TEXTS[language]["no_memory" if is_out_of_memory(error) else "failed"]


def _key(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash


def _queue(session: Session, index: int, question: str) -> tuple[Pending, list[Bubble]]:
    """Return a question for ``Page.answer``, and the conversation that shows it; ends the current answer."""
    session.stop_event.set()
    session.stop_event = threading.Event()
    return Pending(weakref.ref(session), index, question, session.stop_event), bubbles_up_to(
        session.chat, index, question
    )


def _sampling(temperature: float, top_p: float, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """Return the fields of ``Sampling``; a seed of -1 is none."""
    seed = None if seed == -1 else seed
    return {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_tokens), "seed": seed}
