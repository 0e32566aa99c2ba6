"""The page: a picture, a conversation about it, and what one wants to change about the answers."""

import html
import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr
import torch
from gradio.utils import get_upload_folder

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.errors import YiVLError
from yivl.image_processing import load_image
from yivl.inference.chat import Answer, Chat
from yivl.serve.limits import Limits
from yivl.serve.sessions import Session, Sessions
from yivl.serve.transcript import as_json, as_markdown
from yivl.serve.web_texts import TEXTS, Language, Texts

logger = logging.getLogger(__name__)

# gradio hands even plain text to the browser as HTML; these are the places where HTML would begin.
_MARKUP: Final = re.compile(r"<|&(?=[#\w])")
_MODEL: Final = "model"  # all events that use the model share one place in the queue
_PAUSE: Final = 0.05  # seconds between two pieces: a browser draws no faster, and would fall behind
_FORGET_UPLOADS: Final = (600, 3600)  # seconds between two clean-ups, and the age of what they remove
_CSS: Final = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: auto}
#header {align-items: center; justify-content: space-between}
#header > * {flex-grow: 0; min-width: fit-content !important}
#status {min-height: 1.6em; opacity: .75; font-size: .9em}
"""
_DOWNLOAD: Final = """(text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}"""
_SYSTEM_FONTS: Final = ("system-ui", "sans-serif")  # the theme's own would be fetched from elsewhere
_SYSTEM_MONO_FONTS: Final = ("ui-monospace", "monospace")

Message = dict[str, str]
Asked = tuple[int, str, threading.Event]
"""The number of the turn that a question makes or replaces, the question, and what stops its answer."""


class Page:
    """What the events of the page do.

    Args:
        loaded: The model.
        limits: Of visitors.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        self.loaded = loaded
        self.limits = limits
        self.sessions = Sessions(loaded, limits)

    def show_picture(self, upload: dict[str, Any] | None, request: gr.Request) -> tuple[Any, list[Message], str]:
        """Start a conversation about another picture, or about none.

        Args:
            upload: As the browser sent it.
            request: Of the visitor.
        """
        picture, shown = None, gr.skip()
        if upload is not None:
            try:
                picture = self._read(upload["path"])
            except YiVLError as error:
                gr.Warning(str(error))
                shown = None
        self._session(request).start_anew(picture)
        return shown, [], self.about()

    def _read(self, path: str) -> torch.Tensor:
        """Return the ``pixel_values`` of an upload: what is kept is small, however large the picture was."""
        place = Path(path).resolve()
        # A request made by hand can name any file; gradio looks only at those that say they are files.
        if not place.is_relative_to(Path(get_upload_folder()).resolve()) or not place.is_file():
            raise YiVLError("this is no upload")
        if place.stat().st_size > self.limits.max_image_bytes:
            raise YiVLError(f"the picture has more than {self.limits.max_image_bytes:,} bytes")
        try:
            image = load_image(path, max_pixels=self.limits.max_image_pixels)
            return self.loaded.image_processor([image])[0]
        except YiVLError as error:  # says where the server keeps the file
            raise YiVLError(str(error).replace(path, Path(path).name)) from error

    def take(self, question: str, messages: list[Message], language: Language, request: gr.Request) -> Any:
        """Take a question: show it, and let it wait for its turn."""
        session = self._known(messages, language, request)
        if not question.strip():
            raise gr.Error(TEXTS[language].no_question, print_exception=False)
        return (
            "",
            (len(session.chat.turns), question, session.begin()),
            [*_messages(session.chat), _said("user", question)],
        )

    def take_again(self, messages: list[Message], language: Language, request: gr.Request) -> Any:
        """Take the last question once more."""
        session = self._known(messages, language, request)
        if not session.chat.turns:
            raise gr.Error(TEXTS[language].nothing_to_repeat, print_exception=False)
        last = len(session.chat.turns) - 1
        return (last, session.chat.turns[last].question, session.begin()), _messages(session.chat)[:-1]

    def take_edited(self, edit: gr.EditData, messages: list[Message], language: Language, request: gr.Request) -> Any:
        """Take another question in the place of one that was asked."""
        session = self._known(messages, language, request)
        assert isinstance(edit.index, int)
        place, question = edit.index, html.unescape(str(edit.value))
        return (place // 2, question, session.begin()), [*_messages(session.chat)[:place], _said("user", question)]

    def answer(
        self,
        asked: Asked,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
        language: Language,
        request: gr.Request,
    ) -> Iterator[tuple[list[Message], str]]:
        """Stream the answer to what was taken."""
        session, (place, question, event) = self._session(request), asked
        sampling = _sampling(temperature, top_p, max_tokens, seed)
        if session.stop is not event:  # it was closed while the question waited
            gr.Warning(TEXTS[language].gone)
            yield _messages(session.chat), self.about()
            return
        with session.lock:
            chat = session.chat
            if not event.is_set():
                try:
                    if place < len(chat.turns):
                        pieces = chat.edit(place, question, stop_event=event, **sampling)
                    else:
                        pieces = chat.stream(question, session.picture, stop_event=event, **sampling)
                    text, sent = "", 0.0
                    shown = [*_messages(chat)[: 2 * place], _said("user", question)]
                    for piece in pieces:
                        text += piece
                        if time.monotonic() - sent > _PAUSE:
                            sent = time.monotonic()
                            yield [*shown, _said("assistant", text)], gr.skip()
                    if len(chat.turns) > place:  # not if it was stopped before it began
                        session.picture = None
                except Exception as error:  # or the page would wait for ever
                    gr.Warning(self._explain(error, TEXTS[language]))
            answer = chat.last_answer if chat.turns else None
            yield _messages(chat), self.about(answer, TEXTS[language])
        self.sessions.trim()

    def _explain(self, error: Exception, texts: Texts) -> str:
        if isinstance(error, YiVLError):
            return str(error)
        if is_out_of_memory(error):
            return texts.no_memory
        logger.error("an answer failed", exc_info=error)
        return texts.failed

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being generated or waits."""
        self._session(request).stop.set()

    def undo(self, messages: list[Message], language: Language, request: gr.Request) -> Any:
        """Take the last turn back; its question can be asked differently."""
        session = self._known(messages, language, request)
        session.stop.set()
        with session.lock:
            images = session.chat.images[-1:]
            turn = session.chat.undo()
            if turn is None:
                raise gr.Error(TEXTS[language].nothing_to_repeat, print_exception=False)
            if images and images[0]:
                session.picture = images[0][0]
            return turn.question, _messages(session.chat), self.about()

    def clear(self, upload: dict[str, Any] | None, request: gr.Request) -> tuple[list[Message], str]:
        """Start anew with the same picture."""
        _, messages, status = self.show_picture(upload, request)
        return messages, status

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page."""
        self.sessions.drop(_key(request))

    def export(
        self,
        form: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
        request: gr.Request,
    ) -> tuple[str, str]:
        """Return the conversation as a file: its text and its name."""
        write = {"json": as_json, "md": as_markdown}[form]
        text = write(self._session(request).chat, _sampling(temperature, top_p, max_tokens, seed))
        return text, f"conversation.{form}"

    def about(self, answer: Answer | None = None, texts: Texts | None = None) -> str:
        """Return the line about model, device and speed."""
        parts = [f"**{self.loaded.name}**", str(self.loaded.model.device)]
        if answer is not None and texts is not None:
            parts.append(f"{texts.first_token} {answer.seconds_to_first_token:.2f} s")
            parts.append(f"{answer.tokens_per_second:.1f} {texts.tokens_per_second}")
            if answer.finish_reason == "cancelled":
                parts.append(texts.stopped)
        return " · ".join(parts)

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.get(_key(request))

    def _known(self, messages: list[Message], language: Language, request: gr.Request) -> Session:
        """Return the session, if it still holds what the page shows."""
        session = self._session(request)
        if messages and not session.chat.turns:
            raise gr.Error(TEXTS[language].gone, print_exception=False)
        return session


def build_page(loaded: LoadedModel, limits: Limits, examples: Sequence[tuple[Path, str]]) -> gr.Blocks:
    """Return the page of one model.

    Args:
        loaded: The model.
        limits: Of visitors.
        examples: Pictures and questions to start with.
    """
    page, words = Page(loaded, limits), TEXTS["English"]
    with gr.Blocks(title=loaded.name, analytics_enabled=False, delete_cache=_FORGET_UPLOADS) as blocks:
        asked = gr.State()
        with gr.Row(elem_id="header"):
            gr.Markdown("# Yi-VL")
            about = gr.Markdown(words.about)
            language = gr.Radio(list(TEXTS), value="English", show_label=False, container=False, min_width=160)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label=words.picture, sources=["upload", "webcam", "clipboard"], height=320, elem_id="picture"
                )
                with gr.Accordion(words.parameters, open=False) as parameters:
                    temperature = gr.Slider(0, 2, 0.2, step=0.05, label=words.temperature, info=words.temperature_hint)
                    top_p = gr.Slider(0.05, 1, 1.0, step=0.05, label=words.top_p)
                    most = min(limits.max_tokens, loaded.model.config.max_position_embeddings)
                    max_tokens = gr.Slider(1, most, min(512, most), step=1, label=words.max_tokens)
                    seed = gr.Number(None, label=words.seed, info=words.seed_hint, precision=0, minimum=0)
            with gr.Column(scale=3, min_width=300):
                chatbot = gr.Chatbot(
                    label=words.conversation,
                    show_label=False,  # it would lie on the messages
                    placeholder=words.empty,
                    height=440,
                    editable="user",
                    render_markdown=False,
                    buttons=["copy", "copy_all"],
                    feedback_options=None,
                    elem_id="conversation",
                )
                status = gr.Markdown(page.about(), elem_id="status")
                with gr.Row():
                    question = gr.Textbox(
                        label=words.question,
                        elem_id="question",
                        placeholder=words.question_hint,
                        scale=5,
                        lines=1,
                        max_lines=6,
                        autofocus=True,
                    )
                with gr.Row():
                    send = gr.Button(words.send, variant="primary", min_width=90, elem_id="send")
                    stop = gr.Button(words.stop, variant="stop", min_width=90, interactive=False, elem_id="stop")
                    again = gr.Button(words.again, min_width=90, elem_id="again")
                    undo = gr.Button(words.undo, min_width=90, elem_id="undo")
                    clear = gr.Button(words.clear, min_width=90, elem_id="clear")
                with gr.Row():
                    save_json = gr.Button(words.save_json, size="sm", min_width=90, elem_id="save_json")
                    save_markdown = gr.Button(words.save_markdown, size="sm", min_width=90, elem_id="save_markdown")
        shown = gr.Examples([[str(path), text] for path, text in examples], [picture, question], label=words.examples)
        exported, file_name = gr.Textbox(visible=False), gr.Textbox(visible=False)

        settings: list[Any] = [temperature, top_p, max_tokens, seed]
        controls = [send, stop, again, undo, clear, question]

        def busy(is_busy: bool) -> list[Any]:
            return [gr.update(interactive=is_busy == (control is stop)) for control in controls]

        # What of each component is in the visitor's language: its property, and the field of the texts.
        translated: dict[Any, dict[str, str]] = {
            about: {"value": "about"},
            picture: {"label": "picture"},
            parameters: {"label": "parameters"},
            temperature: {"label": "temperature", "info": "temperature_hint"},
            top_p: {"label": "top_p"},
            max_tokens: {"label": "max_tokens"},
            seed: {"label": "seed", "info": "seed_hint"},
            chatbot: {"label": "conversation", "placeholder": "empty"},
            question: {"label": "question", "placeholder": "question_hint"},
            send: {"value": "send"},
            stop: {"value": "stop"},
            again: {"value": "again"},
            undo: {"value": "undo"},
            clear: {"value": "clear"},
            save_json: {"value": "save_json"},
            save_markdown: {"value": "save_markdown"},
            shown.dataset: {"label": "examples"},
        }

        def translate(language: Language) -> dict[Any, Any]:
            texts = TEXTS[language]
            return {
                component: gr.update(**{name: getattr(texts, field) for name, field in names.items()})
                for component, names in translated.items()
            }

        # Without a place in the queue there would be no way for warnings to reach the page.
        quick: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        language.change(translate, language, list(translated), **quick)
        # Opening an upload is ours, and so are the words when that fails: hence no preprocessing by gradio.
        as_sent = {**quick, "preprocess": False}
        picture.change(page.show_picture, picture, [picture, chatbot, status], **as_sent)

        for taking in (
            gr.on(
                [send.click, question.submit],
                page.take,
                [question, chatbot, language],
                [question, asked, chatbot],
                **quick,
            ),
            again.click(page.take_again, [chatbot, language], [asked, chatbot], **quick),
            chatbot.edit(page.take_edited, [chatbot, language], [asked, chatbot], **quick),
        ):
            taking.success(lambda: busy(True), None, controls, **quick).success(
                page.answer,
                [asked, *settings, language],
                [chatbot, status],
                concurrency_limit=1,
                concurrency_id=_MODEL,
                show_progress="minimal",
                api_visibility="private",
            ).then(lambda: busy(False), None, controls, **quick)
        stop.click(page.stop, **quick)
        undo.click(page.undo, [chatbot, language], [question, chatbot, status], **quick)
        gr.on([clear.click, chatbot.clear], page.clear, picture, [chatbot, status], **as_sent)
        for button, form in ((save_json, "json"), (save_markdown, "md")):
            button.click(
                page.export,
                [gr.State(form), *settings],
                [exported, file_name],
                **quick,
            ).then(None, [exported, file_name], None, js=_DOWNLOAD, **quick)
        blocks.unload(page.leave)
    blocks.queue(max_size=limits.max_queue, default_concurrency_limit=1)
    return blocks  # type: ignore[no-any-return]


def launch(blocks: gr.Blocks, limits: Limits, **where: Any) -> None:
    """Serve the page; ``where`` goes to ``gradio.Blocks.launch``."""
    theme = gr.themes.Soft(font=_SYSTEM_FONTS, font_mono=_SYSTEM_MONO_FONTS)
    blocks.launch(
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        max_file_size=limits.max_image_bytes,
        state_session_capacity=limits.max_sessions,
        quiet=True,
        **where,
    )


def _key(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash


def _said(role: str, text: str) -> Message:
    """Return a message that shows the text as it is: nothing in it is markup."""
    return {"role": role, "content": _MARKUP.sub(lambda found: html.escape(found[0]), text)}


def _messages(chat: Chat) -> list[Message]:
    return [
        _said(role, text or "")
        for turn in chat.turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def _sampling(temperature: float, top_p: float, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """Return the fields of ``Sampling``."""
    return {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_tokens), "seed": seed}
