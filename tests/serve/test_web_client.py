"""The endpoint of the page, through gradio's own client over real HTTP."""

import asyncio
import dataclasses
import errno
import logging
from collections.abc import Iterator
from typing import Any, Final

import gradio as gr
import httpx
import pytest
import safehttpx
from fastapi import Request
from gradio.components import chatbot
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from support.golden import CHECKPOINT, GOLDEN
from support.models import load_golden, talkative_checkpoint
from support.serving import free_port, wait_until

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.inference.chat import Chat
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Scheduler
from yivl.serve.web_layout import _refuse, build_page, launch

PHOTO = GOLDEN / "images/photo_rgb.jpg"
LIMITS = Limits(max_tokens=4000, max_queue=2, max_batch=2, max_image_bytes=100_000)
URL: Final = "https://example.com/image.jpg"
FILE: Final = {"path": URL, "meta": {"_type": "gradio.FileData"}}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "api_name": "/ask"}


class Server:
    """A page on a port."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.scheduler, port = Scheduler(loaded, LIMITS), free_port()
        self.blocks = build_page(self.scheduler, LIMITS, [(PHOTO, "What is this?")])
        launch(self.blocks, LIMITS, server_name="127.0.0.1", server_port=port)
        self.client = Client(f"http://127.0.0.1:{port}", verbose=False)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/gradio_api", timeout=60)

    def join(self, event: int, session: str, data: list[Any]) -> None:
        """Make an event of the page without gradio's client, and wait for its end."""
        body = {"fn_index": event, "session_hash": session, "data": data}
        assert self.http.post("/queue/join", json=body).is_success
        with self.http.stream("GET", "/queue/data", params={"session_hash": session}) as response:
            assert any('"process_completed"' in line for line in response.iter_lines())

    def call(self, path: str, body: dict[str, Any]) -> None:
        """Ask at a path, and wait for the answer."""
        event = self.http.post(path, json=body).json()["event_id"]
        assert self.http.get(f"{path}/{event}").is_success

    def close(self) -> None:
        self.http.close()
        self.blocks.close(verbose=False)
        self.scheduler.close()


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Yi-VL, or the architecture that a test asks for."""
    if architecture := getattr(request, "param", None):
        return dataclasses.replace(load_golden(architecture), name=architecture)
    return load_model(talkative_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint"), device="cpu")


@pytest.fixture(scope="module")
def server(model: LoadedModel) -> Iterator[Server]:
    server = Server(model)
    yield server
    server.close()


@pytest.mark.parametrize("model", ["InternVL"], indirect=True)
def test_a_page_of_another_architecture(server: Server, model: LoadedModel) -> None:
    """The heading is the name of the model."""
    expected = Chat(model).ask("Tell me a story", PHOTO, temperature=0, max_new_tokens=12)
    assert server.client.predict("Tell me a story", handle_file(PHOTO), **GREEDY) == expected
    headings = [part["props"]["value"] for part in server.blocks.config["components"] if part["type"] == "markdown"]
    assert headings[0] == "# InternVL"


def test_answers_are_those_of_a_chat(server: Server, model: LoadedModel) -> None:
    expected = Chat(model).ask("Tell me a story", PHOTO, temperature=0, max_new_tokens=12)
    assert server.client.predict("Tell me a story", handle_file(PHOTO), **GREEDY) == expected
    expected = Chat(model).ask("hello", temperature=0.2, top_p=0.7, max_new_tokens=20, seed=5)
    assert server.client.predict(" hello\n", max_tokens=20, seed=5, api_name="/ask") == expected


def test_an_answer_streams_and_ends_when_it_is_cancelled(server: Server) -> None:
    job = server.client.submit("hello", **GREEDY | {"max_tokens": 3000})
    wait_until(lambda: len(job.outputs()) > 2)
    first, second, *_ = job.outputs()
    assert second.startswith(first)
    assert server.scheduler.num_running == 1
    job.cancel()
    wait_until(lambda: not server.scheduler.num_running)


def test_the_client_offers_no_other_event(server: Server) -> None:
    described: Any = server.client.view_api(all_endpoints=True, return_format="dict", print_info=False)
    assert list(described["named_endpoints"]) == ["/ask"]
    assert described["unnamed_endpoints"] == {}
    question, *others = described["named_endpoints"]["/ask"]["parameters"]
    assert (question["parameter_name"], question["parameter_has_default"]) == ("question", False)
    defaults = {"image": None, "temperature": 0.2, "top_p": 0.7, "max_tokens": 512, "seed": None}
    assert {one["parameter_name"]: one["parameter_default"] for one in others} == defaults
    for index, dependency in enumerate(server.blocks.config["dependencies"]):
        assert dependency["api_visibility"] == ("public" if dependency["api_name"] == "ask" else "private"), index
        if dependency["api_name"] != "ask":
            with pytest.raises(ValueError, match=f"Invalid function index: {index}"):
                server.client.predict(fn_index=index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "Type a question first"),
        ({"question": 3}, "wrong type"),
        ({"question": "word " * 5000}, "the context has 4096"),
        ({"temperature": "hot"}, "wrong type"),
        ({"top_p": 7}, "top_p=7; expected above 0"),
        ({"max_tokens": 4001}, "max_tokens=4001; this server allows 4000"),
        ({"seed": 1.5}, "seed=1.5; expected an integer"),
        ({"seed": True}, "seed=True; expected an integer"),
        ({"image": str(PHOTO)}, "wrong type"),
        ({"image": {}}, "wrong type"),
        ({"image": {"url": URL}}, "wrong type"),
        ({"image": handle_file(URL)}, "URLs are not fetched"),
        ({"image": {"path": str(PHOTO)}}, "this is no upload"),
        ({"image": handle_file(GOLDEN / "../../setup.py")}, "setup.py: not a readable image"),
        ({"image": handle_file(CHECKPOINT / "pytorch_model-00001-of-00002.bin")}, "exceeds the maximum file size"),
    ],
)
def test_wrong_arguments_are_reported(server: Server, change: dict[str, Any], message: str) -> None:
    with pytest.raises((AppError, ValueError), match=message):
        server.client.predict(**{"question": "hello", **GREEDY, **change})


def test_requests_beyond_the_queue_are_refused(server: Server) -> None:
    """The limits are those of the page: two answers at a time, two in the queue."""
    long = GREEDY | {"max_tokens": 3000}
    jobs = [server.client.submit("hello", **long) for _ in range(2)]
    wait_until(lambda: server.scheduler.num_running == 2)
    jobs += [server.client.submit("hello", **long) for _ in range(4)]
    wait_until(lambda: sum(job.done() for job in jobs) == 2)
    for job in jobs:
        if job.done():
            assert isinstance(job.exception(), QueueError)
        job.cancel()
    wait_until(lambda: not server.scheduler.num_running + server.scheduler.num_waiting)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What gradio tries to reach, and what components it builds of a client's messages."""
    fetched: list[str] = []

    async def refuse(name: str, *_: object, **__: object) -> None:
        fetched.append(name)
        raise OSError("there is no network")

    monkeypatch.setattr(safehttpx, "get", refuse)
    monkeypatch.setattr(safehttpx, "async_validate_url", refuse)
    monkeypatch.setattr(chatbot, "import_component_and_data", fetched.append)
    return fetched


def chat_message(**content: Any) -> Any:
    return [{"role": "user", "content": [content]}]


@pytest.mark.parametrize(
    "value",
    [
        FILE,
        FILE | {"path": URL.replace("https", "http")},
        FILE | {"path": URL.replace("https", "HTTPS")},
        FILE | {"path": str(PHOTO), "url": URL},
        {"url": URL, "meta": FILE["meta"]},
        [[FILE], {"of": {"the": [FILE]}}],
        chat_message(type="file", file=FILE),
        # Without the mark of a file: gradio would build this component, which fetches its value.
        chat_message(type="component", component="file", value={"path": URL}, constructor_args={}, props={}),
        chat_message(type="component", component="file", value=None, constructor_args={"label": URL}, props={}),
    ],
)
def test_no_event_fetches_a_url(server: Server, fetched: list[str], value: Any) -> None:
    """Also none that gradio's client does not offer: a request written by hand reaches every event."""
    events = [one for one in server.blocks.config["dependencies"] if one["backend_fn"]]
    assert len(events) > 10
    for event in events:
        server.join(event["id"], f"forged {event['id']}", [value] * len(event["inputs"]))
    server.call("/call/ask", {"data": ["hello", value, 0, 1, 1, None]})
    server.call("/call/v2/ask", {"question": "hello", "image": value, "max_tokens": 1})
    for path in ("/run/ask", "/api/ask"):  # without the queue
        assert server.http.post(path, json={"data": ["hello", value, 0, 1, 1, None]}).status_code in (404, 500)
    assert fetched == []


@pytest.mark.parametrize(
    "path", [f"/file={URL}", f"/file={URL.replace('://', '%3A%2F%2F')}", f"/file/{URL}", f"/proxy={URL}"]
)
def test_no_route_fetches_a_url(server: Server, fetched: list[str], path: str) -> None:
    assert server.http.get(path).is_client_error
    assert fetched == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("answer", [None, 0, 0.7, 5, -1, "English"]),
        ("answer", []),
        ("answer", [None, "x", None, [], {}, None]),
        ("send", [5, None, [], "English"]),
        ("send", ["hi", {"path": 5}, [], "English"]),
        ("send", ["hi", None, [], "x"]),
        ("send", ["x" * 1_000_000, None, [], "English"]),
        ("edit", [[], "English"]),
    ],
)
def test_a_forged_event_is_no_traceback(
    server: Server, name: str, data: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    events = [index for index, event in server.blocks.fns.items() if event.name == name]
    server.join(events[0], f"forged {name} {str(data)[:40]}", data)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/queue/join", {"fn_index": 999, "session_hash": "a", "data": []}),
        ("/call/nothing", {"data": []}),
        ("/component_server", {"session_hash": "a", "component_id": 999, "fn_name": "x", "data": 0}),
    ],
)
def test_an_event_that_the_page_does_not_have_is_refused(
    server: Server, path: str, body: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    response = server.http.post(path, json=body)
    assert (response.status_code, response.json()) == (400, {"detail": "the page has no such event"})
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_the_system_and_of_other_routes_are_no_refusals(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk would look like a wrong argument, and a bug of any route like an event that does not exist."""
    errors: list[Exception] = [OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError("of the client")]

    async def fail(*_: Any, **__: Any) -> None:
        raise errors[0]

    monkeypatch.setattr(gr.Blocks, "preprocess_data", fail)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(server.blocks.preprocess_data(None, []))
    del errors[0]
    with caplog.at_level(logging.DEBUG, "yivl"), pytest.raises(gr.Error, match="wrong type or value"):
        asyncio.run(server.blocks.preprocess_data(None, []))
    assert "FileNotFoundError: of the client" in caplog.text

    for path, is_refused in (("/gradio_api/queue/join", True), ("/gradio_api/info", False)):
        request = Request({"type": "http", "path": path, "headers": [], "server": ("host", 80), "scheme": "http"})
        if is_refused:
            assert asyncio.run(_refuse(request, KeyError(999))).status_code == 400
        else:
            with pytest.raises(KeyError):
                asyncio.run(_refuse(request, KeyError(999)))
