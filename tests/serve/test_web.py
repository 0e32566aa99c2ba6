"""The page in a real browser: what a visitor does, and what a visitor must not be able to do."""

import gc
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from playwright.sync_api import Browser, Download, Locator, Page, Request, expect, sync_playwright
from support.golden import GOLDEN, ROOT
from support.models import talkative_checkpoint
from support.serving import free_port, wait_until

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.inference.chat import Chat
from yivl.serve import web
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Scheduler
from yivl.serve.sessions import Sessions
from yivl.serve.web_texts import TEXTS, Language

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "out/screenshots"))

UNREACHABLE = """() => [...document.querySelectorAll("button, input, textarea, h1, p, label, td")].filter((one) => {
    const {left, right, width} = one.getBoundingClientRect();
    const isCut = one.matches("button[id]") && one.scrollWidth > one.clientWidth;
    const isSmall = one.innerText?.trim() && parseFloat(getComputedStyle(one).fontSize) < 12;
    return one.checkVisibility() && width > 1 && (left < 0 || right > innerWidth || isCut || isSmall);
}).map((one) => one.outerHTML.slice(0, 200))"""
"""JavaScript: the controls and texts that lie outside the window, are cut off, or are hard to read."""

browser_test = pytest.mark.browser
TIMEOUT = 30_000  # milliseconds: ends a test that would never reach its state
expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative_checkpoint(tmp_path_factory.mktemp("web") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def scheduler(loaded: LoadedModel) -> Iterator[Scheduler]:
    scheduler = Scheduler(loaded, Limits())
    yield scheduler
    scheduler.close()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The page of that model for two visitors at a time, started as a user starts it."""
    port = free_port()
    command = [sys.executable, "web_demo.py", "--model-path", str(folder), "--cpu-only", "--max-batch", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--server-port", str(port)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    url = f"http://127.0.0.1:{port}"
    printed = ""
    while url not in printed:  # the line is printed once the page is served; it never comes if the process has died
        line = process.stderr.readline()
        assert line, printed
        printed += line
    yield url
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium; on Debian and Ubuntu: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A browser window with the page, and the requests it made."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        # gradio streams the results of an event, and ends the stream when none is left.
        self.num_events = 0
        self.page.on("requestfinished", self._count_event)
        self.page.on("requestfailed", self._count_event)
        self.page.goto(address)
        expect(self.page.locator("#send")).to_be_enabled()
        self.language: Language = "中文" if options.get("locale", "").startswith("zh") else "English"
        expect(self.page.locator("#send")).to_have_text(TEXTS[self.language]["send"])
        expect(self.parameter(TEXTS[self.language]["temperature"])).to_be_hidden()
        # An answer ends when the Stop button is disabled again.
        self.num_answers = 0
        self.page.evaluate(
            """() => {
                const stop = document.querySelector("#stop");
                let wasEnabled = false;
                window.numAnswers = 0;
                new MutationObserver(() => {
                    if (wasEnabled && stop.disabled) window.numAnswers += 1;
                    wasEnabled = !stop.disabled;
                }).observe(stop, {attributes: true});
            }"""
        )

    def show(self, image: Path) -> None:
        remove = self.page.locator("#image button[aria-label='Remove Image']")
        if remove.count():
            with self.server_event():
                remove.click()
            expect(remove).to_have_count(0)
        with self.server_event():
            self.page.set_input_files("#image input[type=file]", image)

    @contextmanager
    def server_event(self) -> Iterator[None]:
        """Inside the block the page makes an event; at its end the server has answered it."""
        before = self.num_events
        yield
        for _ in range(TIMEOUT // 20):
            if self.num_events > before:
                return
            self.page.wait_for_timeout(20)
        raise AssertionError("the server has not answered")

    def _count_event(self, request: Request) -> None:
        self.num_events += "queue/data" in request.url

    def greedy(self, max_tokens: int) -> None:
        self.page.get_by_text("Parameters").click()
        self.set(("Temperature", "0"), ("Maximum tokens", str(max_tokens)))

    def parameter(self, label: str) -> Locator:
        return self.page.get_by_label(f"number input for {label}")

    def set(self, *parameters: tuple[str, str]) -> None:
        for label, value in parameters:
            self.parameter(label).fill(value)

    def type(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)

    def ask(self, question: str) -> None:
        self.type(question)
        self.page.click("#send")
        self.wait()

    def wait(self) -> None:
        """Until the next answer has ended."""
        self.num_answers += 1
        self.page.wait_for_function("count => window.numAnswers >= count", arg=self.num_answers)
        expect(self.page.locator("#send")).to_be_enabled()

    def save(self, button: str) -> Download:
        with self.page.expect_download() as download:
            self.page.click(button)
        return download.value

    def saved(self) -> Any:
        return json.loads(self.save("#save_json").path().read_text(encoding="utf-8"))

    @property
    def messages(self) -> list[str]:
        said = self.page.locator("#conversation [data-testid=user], #conversation [data-testid=bot]")
        return [text.strip() for text in said.all_inner_texts()]

    def expect_messages(self, *messages: str) -> None:
        for _ in range(100):
            if [" ".join(one.split()) for one in self.messages] == [" ".join(one.split()) for one in messages]:
                return
            self.page.wait_for_timeout(100)
        assert self.messages == list(messages)


@pytest.fixture
def visitor(browser: Browser, address: str) -> Iterator[Visitor]:
    one = Visitor(browser, address)
    yield one
    one.context.close()


def answers(loaded: LoadedModel, *questions: str, image: Path | None = None) -> list[str]:
    chat, said = Chat(loaded), []
    for question in questions:
        said += [question, chat.ask(question, image, temperature=0, max_new_tokens=12)]
        image = None
    return said


@browser_test
def test_a_conversation_as_a_visitor_has_it(visitor: Visitor, loaded: LoadedModel) -> None:
    """Upload, ask, ask on, regenerate, edit, undo, clear, and the answers are those of a chat."""
    visitor.greedy(12)
    visitor.show(PHOTO)
    visitor.ask("Tell me a story")
    visitor.expect_messages(*answers(loaded, "Tell me a story", image=PHOTO))
    visitor.ask("And now?")
    whole = answers(loaded, "Tell me a story", "And now?", image=PHOTO)
    visitor.expect_messages(*whole)
    assert re.search(
        r"checkpoint · cpu · first token \d+\.\d+ s · \d+\.\d tokens/s", visitor.page.inner_text("#status")
    )
    visitor.page.click("#regenerate")
    visitor.wait()
    visitor.expect_messages(*whole)
    visitor.page.locator("#conversation button[aria-label=Edit]").first.click()
    box = visitor.page.locator("#conversation textarea").first
    box.fill("你好，图片里有什么")
    visitor.page.locator("#conversation button[aria-label=Submit]").first.click()
    visitor.wait()
    visitor.expect_messages(*answers(loaded, "你好，图片里有什么", image=PHOTO))
    visitor.page.click("#undo")
    visitor.expect_messages()
    expect(visitor.page.locator("#question textarea")).to_have_value("你好，图片里有什么")
    visitor.ask("Tell me a story")  # the image is still there
    visitor.expect_messages(*answers(loaded, "Tell me a story", image=PHOTO))
    visitor.page.click("#clear")
    visitor.expect_messages()
    visitor.ask("Tell me a story")
    visitor.expect_messages(*answers(loaded, "Tell me a story", image=PHOTO))
    visitor.show(WIDE)
    visitor.expect_messages()
    visitor.ask("Tell me a story")
    visitor.expect_messages(*answers(loaded, "Tell me a story", image=WIDE))


@browser_test
def test_a_question_without_an_image(visitor: Visitor, loaded: LoadedModel) -> None:
    visitor.greedy(12)
    visitor.ask("hello")
    visitor.expect_messages(*answers(loaded, "hello"))


@browser_test
def test_the_sampling_defaults_of_the_page(visitor: Visitor) -> None:
    visitor.type("hello")
    visitor.page.click("#send")
    expect(visitor.page.locator("#conversation [data-testid=bot]")).to_have_count(1)
    visitor.page.click("#stop")
    visitor.wait()
    assert visitor.saved()["sampling"] == {"temperature": 0.2, "top_p": 0.7, "max_new_tokens": 512, "seed": None}


@browser_test
def test_a_question_is_asked_whole(visitor: Visitor, loaded: LoadedModel) -> None:
    """Also beyond the 1,200 characters at which the reference cuts."""
    visitor.greedy(12)
    visitor.show(PHOTO)
    question = "Tell me a story. " * 90 + "The end"
    visitor.ask(f"  {question}\n")
    assert visitor.saved()["turns"][0]["question"] == question
    visitor.expect_messages(*answers(loaded, question, image=PHOTO))


def ask_at_length(visitor: Visitor) -> None:
    visitor.greedy(2048)
    visitor.type("hello")
    visitor.page.click("#send")
    expect(visitor.page.locator("#conversation [data-testid=bot]")).to_have_count(1)


@browser_test
def test_an_answer_streams_and_stop_ends_it(visitor: Visitor) -> None:
    ask_at_length(visitor)
    answer = visitor.page.locator("#conversation [data-testid=bot]")
    for _ in range(3):
        expect(answer).not_to_have_text(answer.inner_text())
    visitor.page.click("#stop")
    visitor.wait()
    expect(visitor.page.locator("#status")).to_contain_text("stopped")
    visitor.expect_messages("hello", visitor.saved()["turns"][0]["answer"])


@browser_test
def test_parameters_typed_as_soon_as_they_appear_are_used(browser: Browser, address: str) -> None:
    """A closed accordion of gradio resets what is typed while its fields are still being mounted."""
    for _ in range(3):
        visitor = Visitor(browser, address)
        visitor.page.evaluate(
            """() => {
                [...document.querySelectorAll("button")].find((one) => one.innerText.includes("Parameters")).click();
                const type = () => {
                    const field = document.querySelector("[aria-label='number input for Temperature']");
                    if (!field) return requestAnimationFrame(type);
                    field.value = "0";
                    field.dispatchEvent(new Event("input", {bubbles: true}));
                };
                type();
            }"""
        )
        visitor.set(("Maximum tokens", "3"))
        visitor.ask("hello")
        sampling = visitor.saved()["sampling"]
        assert (sampling["temperature"], sampling["max_new_tokens"]) == (0, 3)
        visitor.context.close()


@browser_test
def test_markup_stays_text(visitor: Visitor) -> None:
    visitor.greedy(12)
    question = "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 2'> <b>bold</b> &lt; a && b"
    visitor.ask(question)
    assert visitor.messages[0] == question
    visitor.page.locator("#conversation button[aria-label=Edit]").first.click()
    visitor.page.locator("#conversation button[aria-label=Submit]").first.click()
    visitor.wait()
    assert visitor.messages[0] == question
    assert visitor.page.evaluate("window.hacked") is None
    assert visitor.page.locator("#conversation b, #conversation img[src=x]").count() == 0


@browser_test
def test_a_file_that_is_no_image_is_refused_with_its_name(visitor: Visitor, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    visitor.greedy(12)
    visitor.show(bad)
    expect(visitor.page.get_by_text("bad.png: not a readable image")).to_be_visible()
    assert visitor.page.get_by_text(str(tmp_path)).count() == 0
    visitor.ask("hello")
    assert len(visitor.messages) == 2
    visitor.page.click("#undo")
    expect(visitor.page.locator("#question textarea")).to_have_value("hello")  # a click while it runs has no effect
    visitor.page.click("#undo")
    expect(visitor.page.get_by_text("There is no question yet.")).to_be_visible()


@browser_test
def test_the_interface_speaks_both_languages(visitor: Visitor) -> None:
    english, chinese = TEXTS["English"], TEXTS["中文"]
    visitor.page.get_by_label("中文").check()
    for key in ("about", "send", "stop", "regenerate", "undo", "parameters", "image", "question"):
        expect(visitor.page.get_by_text(chinese[key], exact=True).first).to_be_visible()
    visitor.page.click("#send")
    expect(visitor.page.get_by_text(chinese["no_question"])).to_be_visible()
    visitor.page.get_by_label("English").check()
    expect(visitor.page.get_by_text(english["about"])).to_be_visible()


@browser_test
@pytest.mark.parametrize(
    ("locale", "query", "language"),
    [
        ("en-GB", "", "English"),
        ("fr-FR", "", "English"),
        ("zh-CN", "", "中文"),
        ("zh-TW", "", "中文"),
        ("zh-CN", "?lang=en", "English"),
        ("en-US", "?lang=zh", "中文"),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(
    browser: Browser, address: str, locale: str, query: str, language: Language
) -> None:
    page = browser.new_context(locale=locale).new_page()
    page.goto(f"{address}/{query}")
    for key in ("about", "send", "question"):
        expect(page.get_by_text(TEXTS[language][key], exact=True).first).to_be_visible()
    other: Language = "English" if language == "中文" else "中文"
    page.get_by_label(other).check()
    expect(page.get_by_text(TEXTS[other]["send"], exact=True)).to_be_visible()
    page.context.close()


@browser_test
def test_a_conversation_is_saved(visitor: Visitor, loaded: LoadedModel) -> None:
    visitor.greedy(12)
    visitor.show(PHOTO)
    visitor.ask("Tell me a story")
    saved = visitor.saved()
    _, answer = answers(loaded, "Tell me a story", image=PHOTO)
    assert saved["turns"] == [{"question": "Tell me a story", "answer": answer, "num_images": 1}]
    assert saved["sampling"]["temperature"] == 0
    assert (saved["model"], saved["sampling"]["max_new_tokens"]) == ("checkpoint", 12)
    markdown = visitor.save("#save_md")
    assert markdown.suggested_filename == "conversation.md"
    assert "    Tell me a story" in markdown.path().read_text(encoding="utf-8")


@browser_test
def test_two_visitors_at_once_have_their_own_conversations(browser: Browser, address: str, loaded: LoadedModel) -> None:
    visitors = [Visitor(browser, address) for _ in range(2)]
    for visitor, image in zip(visitors, (PHOTO, WIDE), strict=True):
        visitor.greedy(12)
        visitor.show(image)
        visitor.type("Tell me a story")
    for visitor in visitors:
        visitor.page.click("#send")
    for visitor, image in zip(visitors, (PHOTO, WIDE), strict=True):
        visitor.wait()
        visitor.expect_messages(*answers(loaded, "Tell me a story", image=image))
        visitor.context.close()


@browser_test
def test_two_visitors_are_answered_at_once_and_a_third_sees_a_queue_position(browser: Browser, address: str) -> None:
    answered, queued = [Visitor(browser, address) for _ in range(2)], Visitor(browser, address)
    for visitor in answered:  # both answers are long: the second one begins before the first one ends
        ask_at_length(visitor)
    queued.type("hello")
    queued.page.click("#send")
    expect(queued.page.locator("#conversation")).to_contain_text("queue: 1/1")
    queued.page.click("#stop")
    for visitor in answered:
        visitor.page.click("#stop")
    for visitor in (*answered, queued):
        visitor.wait()
    assert [len(visitor.messages) for visitor in (*answered, queued)] == [2, 2, 0]
    for visitor in (*answered, queued):
        visitor.context.close()


@browser_test
def test_an_example_is_a_start(visitor: Visitor) -> None:
    visitor.greedy(12)
    visitor.page.get_by_text("What does the sign say?").click()
    expect(visitor.page.locator("#question textarea")).to_have_value("What does the sign say?")
    expect(visitor.page.locator("#image img").first).to_be_visible()
    visitor.page.click("#send")
    visitor.wait()
    assert visitor.messages[0] == "What does the sign say?"


@browser_test
def test_an_example_keeps_the_language_of_the_page(browser: Browser, address: str) -> None:
    visitor = Visitor(browser, address, locale="zh-CN")
    question = visitor.page.locator("#question textarea")
    expect(question).to_have_attribute("placeholder", TEXTS["中文"]["question_hint"])
    visitor.page.get_by_text("What does the sign say?").click()
    expect(question).to_have_value("What does the sign say?")
    expect(visitor.page.locator("#image img").first).to_be_visible()
    expect(question).to_have_attribute("placeholder", TEXTS["中文"]["question_hint"])
    expect(visitor.page.locator("#image")).to_contain_text(TEXTS["中文"]["image"])
    visitor.context.close()


@browser_test
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wide-light", {"viewport": {"width": 1280, "height": 900}}),
        ("wide-dark", {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}),
        ("wide-chinese", {"viewport": {"width": 1280, "height": 900}, "locale": "zh-CN"}),
        ("phone", {"viewport": {"width": 360, "height": 780}, "is_mobile": True}),
        ("phone-chinese", {"viewport": {"width": 360, "height": 780}, "is_mobile": True, "locale": "zh-CN"}),
        ("narrow", {"viewport": {"width": 500, "height": 800}}),
    ],
)
def test_no_request_leaves_the_machine_and_the_page_fits_the_screen(
    browser: Browser, address: str, name: str, options: dict[str, Any]
) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    visitor = Visitor(browser, address, **options)
    assert visitor.page.evaluate("document.activeElement.tagName") == "BODY"  # a focus would scroll past the image
    visitor.show(PHOTO)
    visitor.ask("图片里有什么？")
    visitor.page.get_by_text(TEXTS[visitor.language]["parameters"]).click()
    expect(visitor.page.get_by_label(TEXTS[visitor.language]["seed"])).to_be_visible()
    visitor.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    hosts = {urlsplit(url).netloc for url in visitor.requests if url.startswith(("http", "ws"))}
    assert hosts == {urlsplit(address).netloc}
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]
    assert visitor.page.evaluate(UNREACHABLE) == []
    visitor.context.close()


@browser_test
def test_a_question_sent_with_the_upload_is_about_the_image(visitor: Visitor, loaded: LoadedModel) -> None:
    """The page sends both events at the same time."""
    visitor.greedy(12)
    visitor.type("Tell me a story")
    visitor.page.evaluate(
        """() => {
            const send = () => document.querySelector("#image img") ? document.querySelector("#send").click()
                                                                    : requestAnimationFrame(send);
            send();
        }"""
    )
    visitor.page.set_input_files("#image input[type=file]", PHOTO)
    visitor.wait()
    visitor.expect_messages(*answers(loaded, "Tell me a story", image=PHOTO))


@pytest.fixture
def upload() -> Iterator[Path]:
    upload = Path(get_upload_folder()) / "test" / "photo.jpg"
    upload.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PHOTO, upload)
    yield upload
    shutil.rmtree(upload.parent)


def test_a_question_before_the_event_of_its_upload_is_about_the_image(scheduler: Scheduler, upload: Path) -> None:
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    shown = {"path": str(upload)}
    _, pending, _ = page.send("hello", shown, [], "English", visitor)
    page.show_image(shown, visitor)
    list(page.answer(pending, 0, 1.0, 5, None, "English", visitor))
    page.show_image(shown, visitor)
    chat = page.sessions.get("visitor").chat
    assert [turn.num_images for turn in chat.turns] == [1]
    page.clear(visitor)
    _, pending, _ = page.send("hello", shown, [], "English", visitor)
    list(page.answer(pending, 0, 1.0, 5, None, "English", visitor))
    assert [turn.num_images for turn in chat.turns] == [1]
    _, pending, _ = page.send("hello", None, [], "English", visitor)
    list(page.answer(pending, 0, 1.0, 5, None, "English", visitor))
    assert [turn.num_images for turn in chat.turns] == [0]


def test_an_image_removed_during_an_answer_is_not_asked_about(scheduler: Scheduler, upload: Path) -> None:
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    _, pending, _ = page.send("hello", {"path": str(upload)}, [], "English", visitor)
    answer = page.answer(pending, 0, 1.0, 4000, None, "English", visitor)
    next(answer)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(page.show_image, None, visitor)
        wait_until(pending.stop_event.is_set)
        list(answer)
    session = page.sessions.get("visitor")
    assert (session.image, session.chat.turns) == (None, ())


def test_only_uploads_are_opened(scheduler: Scheduler, upload: Path) -> None:
    """A forged request can name any file of the server."""
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    page.show_image({"path": str(upload)}, visitor)
    assert page.sessions.get("visitor").image is not None
    link = upload.with_name("link.jpg")
    link.unlink(missing_ok=True)
    link.symlink_to(PHOTO)
    for path in (PHOTO, "/dev/zero", "/nothing", upload.parent, link, f"{upload.parent}/../../{PHOTO}"):
        with pytest.warns(UserWarning, match="this is no upload"):
            page.show_image({"path": str(path)}, visitor)
        assert page.sessions.get("visitor").image is None


def test_visitors_are_decoded_in_one_batch(scheduler: Scheduler, loaded: LoadedModel) -> None:
    page = web.Page(scheduler, Limits())
    visitors = [SimpleNamespace(session_hash=name) for name in ("first", "second")]
    questions = ["Tell me a story", "你好，图片里有什么"]
    with ThreadPoolExecutor(2) as pool:
        for visitor, question in zip(visitors, questions, strict=True):
            _, pending, _ = page.send(question, None, [], "English", visitor)
            pool.submit(list, page.answer(pending, 0, 1.0, 4000, None, "English", visitor))
        wait_until(lambda: scheduler.num_running == 2)
        for visitor in visitors:
            page.stop(visitor)
    for visitor, question in zip(visitors, questions, strict=True):
        chat = page.sessions.get(visitor.session_hash).chat
        assert chat.last_answer is not None
        assert chat.last_answer.finish_reason == "cancelled"
        length = chat.last_answer.new_tokens
        assert chat.last_answer.text == Chat(loaded).ask(question, temperature=0, max_new_tokens=length)


def test_the_next_turn_of_a_visitor_reuses_the_cache(scheduler: Scheduler, loaded: LoadedModel) -> None:
    page, visitor, expected = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor"), Chat(loaded)
    messages: list[web.Bubble] = []
    for question in ("hello", "And now?"):
        _, pending, _ = page.send(question, None, messages, "English", visitor)
        *_, (messages, _) = page.answer(pending, 0, 1.0, 12, None, "English", visitor)
        expected.ask(question, temperature=0, max_new_tokens=12)
    chat = page.sessions.get("visitor").chat
    assert chat.last_answer is not None
    assert expected.last_answer is not None
    assert chat.last_answer.cached_tokens == expected.last_answer.cached_tokens > 0


def test_a_visitor_who_leaves_frees_the_chat_only_after_its_last_step(scheduler: Scheduler) -> None:
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    _, pending, _ = page.send("hello", None, [], "English", visitor)
    answer = page.answer(pending, 0, 1.0, 4000, None, "English", visitor)
    next(answer)
    answer.close()
    assert scheduler.num_running == 0
    session = page.sessions.get("visitor")
    assert not session.lock.locked()
    assert len(session.chat.turns) == 1


def test_a_failure_is_reported_and_the_conversation_continues(
    scheduler: Scheduler, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")

    def fail(message: str, *_: object, **__: object) -> None:
        raise RuntimeError(message)

    for message, said in (("CUDA out of memory", "not enough memory"), ("boom", "The answer failed")):
        _, pending, _ = page.send("hello", None, [], "English", visitor)
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model.lm_head, "forward", partial(fail, message))
            with pytest.warns(UserWarning, match=said):
                shown = list(page.answer(pending, 0, 1.0, 5, None, "English", visitor))
        assert shown == [([], page.status())]
    assert "boom" in caplog.text
    _, pending, _ = page.send("hello", None, [], "English", visitor)
    *_, (messages, _) = page.answer(pending, 0, 1.0, 5, None, "English", visitor)
    assert [one["role"] for one in messages] == ["user", "assistant"]


def test_a_question_whose_conversation_was_closed_is_not_answered(scheduler: Scheduler) -> None:
    page, visitor = web.Page(scheduler, Limits(max_sessions=1)), SimpleNamespace(session_hash="visitor")
    _, pending, _ = page.send("hello", None, [], "English", visitor)
    page.send("hello", None, [], "English", SimpleNamespace(session_hash="another"))
    with pytest.warns(UserWarning, match="closed to make room"):
        assert list(page.answer(pending, 0, 1.0, 5, None, "English", visitor)) == [([], page.status())]
    gc.collect()
    assert pending.session() is None  # its memory is free, although the state of the page holds the question


@pytest.mark.filterwarnings("error::UserWarning")  # which gr.Warning is without a browser
def test_a_question_in_whose_place_another_is_asked_changes_nothing_on_the_page(scheduler: Scheduler) -> None:
    page, visitor = web.Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    _, first, _ = page.send("hello", None, [], "English", visitor)
    _, second, _ = page.send("hi", None, [], "English", visitor)
    assert list(page.answer(first, 0, 1.0, 5, None, "English", visitor)) == [(gr.skip(), gr.skip())]
    *_, (messages, _) = page.answer(second, 0, 1.0, 5, None, "English", visitor)
    assert [one["role"] for one in messages] == ["user", "assistant"]


@pytest.mark.parametrize("flags", [(), ("--inbrowser",)])
def test_a_browser_is_opened_only_where_asked_for(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["web_demo.py", *flags])
    arguments = runpy.run_path(str(ROOT / "web_demo.py"))["parse_args"]()
    assert arguments.inbrowser == bool(flags)
    assert (arguments.server_name, arguments.server_port, arguments.share) == ("127.0.0.1", 8111, False)


def test_both_languages_have_every_text() -> None:
    assert TEXTS["English"].keys() == TEXTS["中文"].keys()
    assert all(text for texts in TEXTS.values() for text in texts.values())


def test_conversations_are_bounded_by_number(loaded: LoadedModel) -> None:
    sessions = Sessions(loaded, Limits(max_sessions=2))
    first, second = sessions.get("first"), sessions.get("second")
    assert sessions.get("first") is first
    sessions.get("third")
    assert len(sessions) == 2
    assert second.stop_event.is_set()
    assert sessions.get("first") is first
    sessions.drop("first")
    assert sessions.get("first") is not first
    sessions.drop("unknown")
