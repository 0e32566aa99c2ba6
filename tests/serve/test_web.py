"""The page in a real browser: what a visitor does, and what a visitor must not be able to do."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from gradio.utils import get_upload_folder
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.golden import CHECKPOINT, GOLDEN
from support.training import ROOT

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.checkpoint.saving import save_checkpoint
from yivl.inference.chat import Chat
from yivl.serve import web as serve
from yivl.serve.limits import Limits
from yivl.serve.sessions import Sessions
from yivl.serve.web_texts import TEXTS

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "out/screenshots"))

browser_test = pytest.mark.browser
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model, changed so that neither stop string nor end of text ever leads: its answers are long."""
    golden = load_model(CHECKPOINT, device="cpu")
    with torch.no_grad():
        golden.model.lm_head.weight[[294, 710, golden.tokenizer.eos_token_id]] = 0
    target = tmp_path_factory.mktemp("web") / "checkpoint"
    clip_processor = golden.image_processor.clip_processor
    save_checkpoint(golden.model, target, tokenizer=golden.tokenizer, image_processor=clip_processor)
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The page of that model, started as a user starts it."""
    port = 18111
    command = [sys.executable, "web_demo.py", "--model-path", folder, "--cpu-only", "--server-port", str(port)]
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    url = f"http://127.0.0.1:{port}"
    while url not in (line := process.stderr.readline()):
        assert line, "the page did not start"
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
    """Somebody with the page open, and the requests their browser made."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        for _ in range(100):
            try:
                self.page.goto(address)
                break
            except Exception:
                time.sleep(0.2)
        expect(self.page.locator("#send")).to_be_enabled()

    def show(self, picture: Path) -> None:
        remove = self.page.locator("#picture button[aria-label='Remove Image']")
        if remove.count():
            remove.click()
            expect(remove).to_have_count(0)
        self.page.set_input_files("#picture input[type=file]", picture)
        self.page.wait_for_timeout(1_000)  # it travels to the server, and is looked at there

    def greedy(self, max_tokens: int) -> None:
        self.set(("Temperature", "0"), ("Tokens at most", str(max_tokens)))

    def set(self, *parameters: tuple[str, str]) -> None:
        self.page.get_by_text("Parameters").click()
        for label, value in parameters:
            number = self.page.get_by_label(f"number input for {label}")
            number.fill(value)
            number.press("Enter")

    def type(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)

    def ask(self, question: str) -> None:
        self.type(question)
        self.page.click("#send")
        self.wait()

    def wait(self) -> None:
        """Until the answer is there."""
        expect(self.page.locator("#stop")).to_be_disabled()
        expect(self.page.locator("#send")).to_be_enabled()
        self.page.wait_for_timeout(200)
        expect(self.page.locator("#send")).to_be_enabled()

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
    visitor.page.click("#again")
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
    assert visitor.page.locator("#question textarea").input_value() == "你好，图片里有什么"
    visitor.ask("Tell me a story")  # the picture is still there
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
def test_a_question_without_a_picture(visitor: Visitor, loaded: LoadedModel) -> None:
    visitor.greedy(12)
    visitor.ask("hello")
    visitor.expect_messages(*answers(loaded, "hello"))


def ask_at_length(visitor: Visitor) -> None:
    visitor.greedy(2048)
    visitor.type("hello")
    visitor.page.click("#send")
    expect(visitor.page.locator("#conversation [data-testid=bot]")).to_have_count(1)


@browser_test
def test_an_answer_streams_and_stop_ends_it(visitor: Visitor) -> None:
    ask_at_length(visitor)
    answer = visitor.page.locator("#conversation [data-testid=bot]")
    lengths = []
    for _ in range(3):
        lengths.append(len(answer.inner_text()))
        visitor.page.wait_for_timeout(200)
    assert lengths[0] < lengths[-1]
    visitor.page.click("#stop")
    visitor.wait()
    assert "stopped" in visitor.page.inner_text("#status")
    stopped = visitor.messages
    visitor.page.wait_for_timeout(500)
    assert visitor.messages == stopped


@browser_test
def test_markup_stays_text(visitor: Visitor) -> None:
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
def test_a_file_that_is_no_picture_is_refused_kindly(visitor: Visitor, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    visitor.show(bad)
    expect(visitor.page.get_by_text("bad.png: not a picture that can be read")).to_be_visible()
    assert visitor.page.get_by_text(str(tmp_path)).count() == 0
    visitor.ask("hello")
    assert len(visitor.messages) == 2
    visitor.page.click("#undo")
    visitor.page.click("#undo")
    expect(visitor.page.get_by_text("There is no question yet.")).to_be_visible()


@browser_test
def test_the_interface_speaks_both_languages(visitor: Visitor) -> None:
    english, chinese = TEXTS["English"], TEXTS["中文"]
    visitor.page.get_by_label("中文").check()
    for text in (chinese.about, chinese.send, chinese.stop, chinese.again, chinese.undo, chinese.parameters):
        expect(visitor.page.get_by_text(text, exact=True).first).to_be_visible()
    visitor.page.click("#send")
    expect(visitor.page.get_by_text(chinese.no_question)).to_be_visible()
    visitor.page.get_by_label("English").check()
    expect(visitor.page.get_by_text(english.about)).to_be_visible()


@browser_test
def test_a_conversation_is_saved(visitor: Visitor, loaded: LoadedModel) -> None:
    visitor.greedy(12)
    visitor.show(PHOTO)
    visitor.ask("Tell me a story")
    with visitor.page.expect_download() as download:
        visitor.page.click("#save_json")
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    _, answer = answers(loaded, "Tell me a story", image=PHOTO)
    assert saved["turns"] == [{"question": "Tell me a story", "answer": answer, "num_images": 1}]
    assert saved["sampling"]["temperature"] == 0
    assert (saved["model"], saved["sampling"]["max_new_tokens"]) == ("checkpoint", 12)
    with visitor.page.expect_download() as download:
        visitor.page.click("#save_markdown")
    assert download.value.suggested_filename == "conversation.md"
    assert "    Tell me a story" in download.value.path().read_text(encoding="utf-8")


@browser_test
def test_two_visitors_at_once_have_their_own_conversations(browser: Browser, address: str, loaded: LoadedModel) -> None:
    visitors = [Visitor(browser, address) for _ in range(2)]
    for visitor, picture in zip(visitors, (PHOTO, WIDE), strict=True):
        visitor.greedy(12)
        visitor.show(picture)
    for visitor in visitors:
        visitor.type("Tell me a story")
    for visitor in visitors:
        visitor.page.click("#send")
    for visitor, picture in zip(visitors, (PHOTO, WIDE), strict=True):
        visitor.wait()
        visitor.expect_messages(*answers(loaded, "Tell me a story", image=picture))
        visitor.context.close()


@browser_test
def test_who_waits_sees_the_place_in_the_queue_and_can_leave_it(browser: Browser, address: str) -> None:
    first, second = Visitor(browser, address), Visitor(browser, address)
    ask_at_length(first)
    second.type("hello")
    second.page.click("#send")
    expect(second.page.locator("#conversation")).to_contain_text("queue: 1/1")
    second.page.click("#stop")
    first.page.click("#stop")
    for visitor in (first, second):
        visitor.wait()
    assert len(first.messages) == 2
    assert second.messages == []
    for visitor in (first, second):
        visitor.context.close()


@browser_test
def test_an_example_is_a_start(visitor: Visitor) -> None:
    visitor.page.get_by_text("What does the sign say?").click()
    expect(visitor.page.locator("#question textarea")).to_have_value("What does the sign say?")
    expect(visitor.page.locator("#picture img").first).to_be_visible()
    visitor.page.click("#send")
    visitor.wait()
    assert visitor.messages[0] == "What does the sign say?"


@browser_test
def test_nothing_leaves_the_machine_and_a_phone_shows_all(browser: Browser, address: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name, options in (
        ("wide-light", {"viewport": {"width": 1280, "height": 900}}),
        ("wide-dark", {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "is_mobile": True}),
    ):
        visitor = Visitor(browser, address, **options)
        visitor.show(PHOTO)
        visitor.ask("图片里有什么？")
        visitor.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
        hosts = {urlsplit(url).netloc for url in visitor.requests if url.startswith(("http", "ws"))}
        assert hosts == {urlsplit(address).netloc}
        wide = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= options["viewport"]["width"]  # type: ignore[index]
        visitor.context.close()


def test_only_uploads_are_opened(loaded: LoadedModel, tmp_path: Path) -> None:
    """A request made by hand can name any file of the server."""
    page, visitor = serve.Page(loaded, Limits()), SimpleNamespace(session_hash="visitor")
    upload = Path(get_upload_folder()) / "test" / "photo.jpg"
    upload.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PHOTO, upload)
    page.show_picture({"path": str(upload)}, visitor)
    assert page.sessions.get("visitor").picture is not None
    link = upload.with_name("link.jpg")
    link.unlink(missing_ok=True)
    link.symlink_to(PHOTO)
    for path in (PHOTO, "/dev/zero", "/nothing", upload.parent, link, f"{upload.parent}/../../{PHOTO}"):
        with pytest.warns(UserWarning, match="this is no upload"):
            page.show_picture({"path": str(path)}, visitor)
        assert page.sessions.get("visitor").picture is None
    shutil.rmtree(upload.parent)


def test_a_failure_is_said_and_the_conversation_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page, visitor = serve.Page(loaded, Limits()), SimpleNamespace(session_hash="visitor")

    def fail(message: str, *_: object, **__: object) -> None:
        raise RuntimeError(message)

    for message, said in (("CUDA out of memory", "not enough memory"), ("boom", "The answer failed")):
        _, asked, _ = page.take("hello", [], "English", visitor)
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model.lm_head, "forward", partial(fail, message))
            with pytest.warns(UserWarning, match=said):
                shown = list(page.answer(asked, 0, 1.0, 5, None, "English", visitor))
        assert shown == [([], page.about())]
    assert "boom" in caplog.text
    _, asked, _ = page.take("hello", [], "English", visitor)
    *_, (messages, _) = page.answer(asked, 0, 1.0, 5, None, "English", visitor)
    assert [one["role"] for one in messages] == ["user", "assistant"]


def test_a_question_whose_conversation_was_closed_is_not_answered(loaded: LoadedModel) -> None:
    page, visitor = serve.Page(loaded, Limits(max_sessions=1)), SimpleNamespace(session_hash="visitor")
    _, asked, _ = page.take("hello", [], "English", visitor)
    page.take("hello", [], "English", SimpleNamespace(session_hash="another"))
    with pytest.warns(UserWarning, match="closed to make room"):
        assert list(page.answer(asked, 0, 1.0, 5, None, "English", visitor)) == [([], page.about())]


def test_conversations_are_bounded_by_number_and_memory(loaded: LoadedModel) -> None:
    sessions = Sessions(loaded, Limits(max_sessions=2, max_cache_bytes=1))
    first, second = sessions.get("first"), sessions.get("second")
    for session in (first, second):
        session.chat.ask("hello", temperature=0, max_new_tokens=3)
        assert session.chat.num_cache_bytes > 0
    with second.lock:  # it is answering
        sessions.trim()
        assert first.chat.num_cache_bytes == 0 < second.chat.num_cache_bytes
    assert len(first.chat.turns) == 1
    expected = Chat(loaded)
    expected.ask("hello", temperature=0, max_new_tokens=3)
    assert first.chat.ask("And now?", temperature=0, max_new_tokens=3) == expected.ask(
        "And now?", temperature=0, max_new_tokens=3
    )
    assert sessions.get("first") is first
    sessions.get("third")
    assert len(sessions) == 2
    assert second.stop.is_set()
    assert sessions.get("first") is first
    sessions.drop("first")
    assert sessions.get("first") is not first
    sessions.drop("nobody")
