"""Components of the web page, and the callback of each event."""

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr
from fastapi import Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from gradio.events import api
from gradio.route_utils import FnIndexInferError

from yivl.errors import YiVLError
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Scheduler
from yivl.serve.web import MAX_TOKENS, TEMPERATURE, TOP_P, Page
from yivl.serve.web_texts import TEXTS, Language

logger = logging.getLogger(__name__)

_UPLOAD_CLEANUP: Final = (600, 3600)  # seconds between two clean-ups, and the age of the uploads they remove
_CSS: Final = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: auto}
#header {align-items: center; justify-content: space-between}
#header > * {flex-grow: 0; min-width: fit-content !important}
#status {min-height: 1.6em; opacity: .75; font-size: .9em}
#conversation .placeholder-content {padding: 0 1em}
@media (max-width: 700px) {
    #header {gap: .5em}
    #header > :nth-child(2) {order: 1; flex-basis: 100%}
    #image {height: 240px !important}
    #conversation {height: min(440px, 45vh) !important}
}
"""
_DOWNLOAD: Final = """(text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}"""
_LANGUAGE: Final = """() => {
    const wanted = new URLSearchParams(location.search).get("lang") || navigator.language;
    return wanted.toLowerCase().startsWith("zh") ? "中文" : "English";
}"""
_CLOSE: Final = '() => ({__type__: "update", open: false})'
_FORM_BYTES: Final = 2**20  # of an upload, beside the file
_FORGED: Final = (LookupError, TypeError, ValueError, AttributeError, FnIndexInferError)
"""What gradio raises while it looks up the event that a request names, and the names of its arguments."""

_EVENT_ROUTES: Final = ("/queue/join", "/call/", "/run/", "/api/", "/component_server")
"""Routes that do it; they only queue the event, or catch what its callback raises."""

_OF_THE_SYSTEM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of files for which no request is the reason, unlike a path that does not exist."""

_SYSTEM_FONTS: Final = ("system-ui", "sans-serif")  # the theme's own would be fetched from another host
_SYSTEM_MONO_FONTS: Final = ("ui-monospace", "monospace")


class _Layout:
    """The components of the page; build it inside ``gr.Blocks``."""

    def __init__(self, page: Page, examples: Sequence[tuple[Path, str]]) -> None:
        self.page = page
        self.translated: dict[Any, dict[str, str]] = {}
        """The properties of each component that are in the visitor's language, and their keys in ``TEXTS``."""
        with gr.Row(elem_id="header"):
            gr.Markdown(f"# {page.loaded.name}")
            self._add(gr.Markdown, {"value": "about"})
            self.language = gr.Radio(list(TEXTS), value="English", show_label=False, container=False, min_width=160)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._add_inputs()
            with gr.Column(scale=3, min_width=300):
                self._add_conversation()
        rows = [[str(path), text] for path, text in examples]
        inputs, label = [self.image, self.question], TEXTS["English"]["examples"]
        shown = gr.Examples(rows, inputs, label=label, api_visibility="private")
        shown.input_component_props = [{} for _ in inputs]  # which a click would restore: the texts of another language
        self.examples = shown.dataset
        self.translated[self.examples] = {"label": "examples"}

    def _add(self, component: Callable[..., Any], texts: dict[str, str], *values: Any, **options: Any) -> Any:
        """Add a component; ``texts`` are the keys of its translated properties."""
        added = component(*values, **{name: TEXTS["English"][key] for name, key in texts.items()}, **options)
        self.translated[added] = texts
        return added

    def _add_inputs(self) -> None:
        sources = ["upload", "webcam", "clipboard"]
        self.image = self._add(gr.Image, {"label": "image"}, sources=sources, height=320, elem_id="image")
        most = min(self.page.limits.max_tokens, self.page.loaded.model.config.max_position_embeddings)
        # Open until the page has loaded: gradio mounts the fields of a closed accordion when it is opened, and what is
        # typed before that has finished is overwritten by the defaults.
        self.parameters = self._add(gr.Accordion, {"label": "parameters"}, open=True)
        with self.parameters:
            self.settings = [
                self._add(
                    gr.Slider, {"label": "temperature", "info": "temperature_hint"}, 0, 2, TEMPERATURE, step=0.05
                ),
                self._add(gr.Slider, {"label": "top_p"}, 0.05, 1, TOP_P, step=0.05),
                self._add(gr.Slider, {"label": "max_tokens"}, 1, most, min(MAX_TOKENS, most), step=1),
                # -1: gradio 6 sends 0 for a number without a value.
                self._add(gr.Number, {"label": "seed", "info": "seed_hint"}, -1, precision=0, minimum=-1),
            ]

    def _add_conversation(self) -> None:
        self.chatbot = self._add(
            gr.Chatbot,
            {"label": "conversation", "placeholder": "empty"},
            show_label=False,  # it would cover the messages
            height=440,
            editable="user",
            render_markdown=False,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            elem_id="conversation",
        )
        self.status = gr.Markdown(self.page.status(), elem_id="status")
        with gr.Row():
            texts = {"label": "question", "placeholder": "question_hint"}
            self.question = self._add(gr.Textbox, texts, elem_id="question", max_lines=6)
        with gr.Row():
            self.send = self._button("send", variant="primary")
            self.stop = self._button("stop", variant="stop", interactive=False)
            self.regenerate = self._button("regenerate", min_width=130)
            self.undo, self.clear = self._button("undo"), self._button("clear")
        with gr.Row():
            self.exports = {form: self._button(f"save_{form}", size="sm") for form in ("json", "md")}

    def _button(self, key: str, min_width: int = 90, **options: Any) -> Any:
        return self._add(gr.Button, {"value": key}, min_width=min_width, elem_id=key, **options)

    def connect(self, blocks: gr.Blocks) -> None:
        """Give every event its callback."""
        page = self.page
        # Without a place in the queue there would be no way for warnings to reach the page.
        quick: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        # Uploads are opened by us, with error messages of our own. Of messages that a client sends gradio would build
        # components, with arguments of the client's choice.
        raw = {**quick, "preprocess": False}
        blocks.load(None, None, self.parameters, js=_CLOSE)
        blocks.load(None, None, self.language, js=_LANGUAGE)  # if this changes it, the server sends the texts
        blocks.unload(page.leave)
        self.language.change(self._translate, self.language, list(self.translated), **quick)
        self.image.change(page.show_image, self.image, [self.image, self.chatbot, self.status], **raw)
        gr.on([self.clear.click, self.chatbot.clear], page.clear, None, [self.chatbot, self.status], **quick)
        self.stop.click(page.stop, **quick)
        shown = [self.chatbot, self.language]
        self.undo.click(page.undo, shown, [self.question, self.chatbot, self.status], **raw)
        self._connect_questions(quick, raw)
        api(page.ask, api_name="ask", concurrency_limit=page.limits.max_batch, concurrency_id="answers")
        exported, file_name = gr.Textbox(visible=False), gr.Textbox(visible=False)
        for form, button in self.exports.items():
            button.click(page.export, [gr.State(form), *self.settings], [exported, file_name], **quick).then(
                None, [exported, file_name], None, js=_DOWNLOAD, **quick
            )

    def _connect_questions(self, quick: dict[str, Any], raw: dict[str, Any]) -> None:
        page, pending, shown = self.page, gr.State(), [self.chatbot, self.language]
        asked = [self.question, self.image, *shown]
        controls = [self.send, self.stop, self.regenerate, self.undo, self.clear, self.question]

        def busy(is_busy: bool) -> list[Any]:
            return [gr.update(interactive=is_busy == (control is self.stop)) for control in controls]

        sending = [self.send.click, self.question.submit]
        for queued in (
            gr.on(sending, page.send, asked, [self.question, pending, self.chatbot], **raw),
            self.regenerate.click(page.regenerate, shown, [pending, self.chatbot], **raw),
            self.chatbot.edit(page.edit, shown, [pending, self.chatbot], **raw),
        ):
            queued.success(lambda: busy(True), None, controls, **quick).success(
                page.answer,
                [pending, *self.settings, self.language],
                [self.chatbot, self.status],
                concurrency_limit=page.limits.max_batch,
                concurrency_id="answers",  # one queue: a visitor who waits sees a position in it
                show_progress="minimal",
                api_visibility="private",
            ).then(lambda: busy(False), None, controls, **quick)

    def _translate(self, language: Language) -> dict[Any, Any]:
        updates: dict[Any, Any] = {}
        for component, texts in self.translated.items():
            properties: dict[str, Any] = {name: TEXTS[language][key] for name, key in texts.items()}
            updates[component] = gr.update(**properties)
        updates[self.examples] |= {"headers": [TEXTS[language]["image"], TEXTS[language]["question"]]}
        return updates


class _LocalBlocks(gr.Blocks):
    """Blocks that answer a request written by hand with an error of one line.

    Their events take uploads only: gradio would download a URL in place of a file, of any size.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """Return the arguments of a callback; the inputs of every event and route pass here before any is read.

        Raises:
            gr.Error: If a file is a URL, or a value is none that the page sends.
        """
        try:
            if _has_url(inputs):
                raise gr.Error("an image must be a file; URLs are not fetched", print_exception=False)
            values = await super().preprocess_data(block_fn, inputs, *rest, **options)
            for component, value in zip(block_fn.inputs, values, strict=True):
                if isinstance(component, gr.Textbox) and not isinstance(value, str):
                    raise TypeError("text expected")
                if isinstance(component, gr.Radio) and value not in TEXTS:
                    raise ValueError("not a language")
            return values
        except Exception as error:  # the components of gradio raise errors of many types
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OF_THE_SYSTEM:
                raise
            logger.debug("refused the arguments of an event", exc_info=error)
            raise gr.Error("an argument has the wrong type or value", print_exception=False) from error


def _has_url(value: Any) -> bool:
    """Return whether a file in the JSON of a request is a URL; what looks like a file is taken for one."""
    if isinstance(value, dict):
        return "://" in str(value.get("path")) or any(map(_has_url, value.values()))
    return isinstance(value, list) and any(map(_has_url, value))


def _refuse_url(request: Request) -> None:
    """Close gradio's routes that return what is at a URL, such as ``/gradio_api/file=https://host/name``.

    A path with control characters, on which gradio fails, is refused too.
    """
    if any("://" in str(value) or not str(value).isprintable() for value in request.path_params.values()):
        raise HTTPException(403)


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer a request for an event that the page does not have."""
    if not any(route in request.url.path for route in _EVENT_ROUTES):
        raise error
    logger.debug("refused a request", exc_info=error)
    logger.warning("%s: refused, the page has no such event (%s)", request.url.path[:60], type(error).__name__)
    return JSONResponse({"detail": "the page has no such event"}, 400)


def build_page(scheduler: Scheduler, limits: Limits, examples: Sequence[tuple[Path, str]]) -> gr.Blocks:
    """Return the page of a running scheduler; ``examples`` are images and questions to start with."""
    with _LocalBlocks(title=scheduler.loaded.name, analytics_enabled=False, delete_cache=_UPLOAD_CLEANUP) as blocks:
        _Layout(Page(scheduler, limits), examples).connect(blocks)
    blocks.queue(max_size=limits.max_queue, default_concurrency_limit=1)
    return blocks  # type: ignore[no-any-return]


def launch(blocks: gr.Blocks, limits: Limits, **where: Any) -> None:
    """Start serving the page and return; ``where`` goes to ``gradio.Blocks.launch``.

    Raises:
        YiVLError: If the port cannot be listened on.
    """
    try:
        blocks.launch(
            theme=gr.themes.Soft(font=_SYSTEM_FONTS, font_mono=_SYSTEM_MONO_FONTS),
            css=_CSS,
            app_kwargs={
                "dependencies": [Depends(_refuse_url)],
                "exception_handlers": dict.fromkeys(_FORGED, _refuse),
                "max_body_size": limits.max_image_bytes + _FORM_BYTES,
            },
            footer_links=[],
            run_history=False,
            max_file_size=limits.max_image_bytes,
            state_session_capacity=limits.max_sessions,
            prevent_thread_lock=True,
            quiet=True,
            **where,
        )
    except OSError as error:  # gradio's way to say that the port is taken
        raise YiVLError(f"--server-port {where.get('server_port')}: cannot be listened on; choose another") from error
