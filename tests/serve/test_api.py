"""The API over real HTTP, mostly through OpenAI's own client, against what a chat answers."""

import argparse
import asyncio
import dataclasses
import io
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import openai
import pytest
import schemathesis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import checks
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient
from support.golden import GOLDEN, ROOT
from support.models import ARCHITECTURES, load_golden, talkative_checkpoint
from support.serving import data_url, free_port, user, wait_until

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.conversation import Turn
from yivl.errors import YiVLError
from yivl.inference.chat import Chat, GenerationState
from yivl.serve.app import build_app
from yivl.serve.completions import Exchange
from yivl.serve.guard import Guard
from yivl.serve.limits import Limits
from yivl.serve.listening import Connection, bind
from yivl.serve.listening import Server as StoppableServer
from yivl.serve.metrics import Metrics
from yivl.serve.remote import Fetcher
from yivl.serve.scheduler import Overloaded, Request, Scheduler, ShuttingDown
from yivl.serve.schema import ChatRequest, UserMessage

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
TEXT: dict[str, Any] = {"type": "text", "text": "hi"}
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
LIMITS = Limits(
    max_tokens=512,
    max_images=3,
    max_image_bytes=200_000,
    max_image_pixels=10**6,
    max_body_bytes=10**6,
    max_cache_bytes=2**24,
)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
QUESTIONS = ["Tell me a story", "你好，图片里有什么", "And now?", "hello"]


@dataclass
class Server:
    url: str
    key: str
    scheduler: Scheduler
    server: uvicorn.Server

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def post(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60, **options)

    def wait_until_idle(self) -> None:
        wait_until(lambda: not self.scheduler.num_running + self.scheduler.num_waiting)


def parts(part: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


@contextmanager
def serving(loaded: LoadedModel, limits: Limits = LIMITS, key: str = "secret") -> Iterator[Server]:
    scheduler = Scheduler(loaded, limits)
    config = uvicorn.Config(
        build_app(scheduler, limits, api_key=key),
        port=0,
        http=partial(Connection, limits=limits),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", key, scheduler, server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def architecture(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "Yi-VL"))


@pytest.fixture(scope="module")
def api_model(architecture: str) -> LoadedModel:
    return load_golden(architecture)


@pytest.fixture(scope="module")
def loaded(architecture: str) -> LoadedModel:
    """A copy of the model, which no server runs."""
    return load_golden(architecture)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(talkative_checkpoint(tmp_path_factory.mktemp("api") / "checkpoint"), device="cpu")


@pytest.fixture(scope="module")
def api(api_model: LoadedModel) -> Iterator[Server]:
    with serving(api_model) as server:
        yield server


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def metrics(api: Server) -> str:
    return httpx.get(f"{api.url}/metrics", headers={"Authorization": f"Bearer {api.key}"}).text


@each_architecture
def test_answers_are_those_of_a_chat(api: Server, loaded: LoadedModel) -> None:
    chat = Chat(loaded, system="Be kind.")
    asked = [("What is this?", [PHOTO]), ("And now?", []), ("你好，图片里有什么", [WIDE, PHOTO])]
    messages: list[Any] = [{"role": "system", "content": "Be kind."}]
    for question, images in asked:
        messages.append(user(question, *(data_url(image.read_bytes()) for image in images)))
        expected = chat.ask(question, images, temperature=0, max_new_tokens=12)
        completion = api.client.chat.completions.create(model="checkpoint", messages=messages, **GREEDY)
        choice = completion.choices[0]
        assert choice.message.content == expected
        assert chat.last_answer is not None
        assert choice.finish_reason == chat.last_answer.finish_reason
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == chat.last_answer.prompt_tokens
        assert completion.usage.completion_tokens == chat.last_answer.new_tokens
        messages.append({"role": "assistant", "content": expected})


@contextmanager
def prefilled(loaded: LoadedModel) -> Iterator[list[int]]:
    """Record how many positions each forward pass of more than one position computes."""
    lengths: list[int] = []

    def record(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > 1:
            lengths.append(inputs[0].shape[1])

    hook = loaded.model.model.layers[0].register_forward_pre_hook(record)
    yield lengths
    hook.remove()


@contextmanager
def encoded(loaded: LoadedModel) -> Iterator[list[int]]:
    """Record the batch size of each forward pass of the ViT."""
    sizes: list[int] = []
    hook = loaded.model.get_vision_tower().register_forward_hook(lambda *arguments: sizes.append(len(arguments[2])))
    yield sizes
    hook.remove()


def conversation(server: Server, image: str, system: str = "Be kind.") -> Iterator[tuple[str, dict[str, int]]]:
    """Ask three questions as a stateless client does; yield each answer and its usage."""
    messages: list[Any] = [{"role": "system", "content": system}]
    for index, question in enumerate(QUESTIONS[:3]):
        messages.append(user(question, *([] if index else [image])))
        body = server.post({"model": "checkpoint", "messages": messages, **GREEDY}).json()
        answer = body["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        yield answer, body["usage"]


@each_architecture
def test_a_stateless_client_gets_the_answers_of_a_server_without_reuse_and_computes_only_what_is_new(
    api_model: LoadedModel,
) -> None:
    """The bodies, ``usage`` included, are equal: nothing in them tells what an earlier request has computed."""
    image = data_url(WIDE.read_bytes())
    with serving(api_model, dataclasses.replace(LIMITS, max_cache_bytes=0)) as server, prefilled(api_model) as whole:
        expected = list(conversation(server, image))
    assert whole == [usage["prompt_tokens"] for _, usage in expected]
    with serving(api_model) as server, prefilled(api_model) as lengths, encoded(api_model) as images:
        assert list(conversation(server, image)) == expected
        assert lengths[0] == whole[0]
        assert all(length < 0.5 * before for length, before in zip(lengths[1:], whole[1:], strict=True))
        lengths.clear()
        assert list(conversation(server, image)) == expected  # another client
        assert sum(lengths) == 0  # each prompt but its last position
        assert images == [1]


@each_architecture
def test_clients_that_ask_about_one_image_at_the_same_time_share_its_prefix(api_model: LoadedModel) -> None:
    image = data_url(PHOTO.read_bytes())
    messages = [[user(question, image)] for question in QUESTIONS]
    with serving(api_model) as server, prefilled(api_model) as lengths, encoded(api_model) as images:
        with ThreadPoolExecutor(4) as pool:
            bodies = [{"model": "checkpoint", "messages": one, **GREEDY} for one in messages]
            answers = [answer.json() for answer in pool.map(server.post, bodies)]
        assert images == [1]
        assert len(lengths) == len(messages)
        num_patches = api_model.model.config.num_patches
        assert sum(lengths) <= sum(answer["usage"]["prompt_tokens"] for answer in answers) - 3 * num_patches
    for answer, question in zip(answers, QUESTIONS, strict=True):
        assert answer["choices"][0]["message"]["content"] == Chat(api_model).ask(
            question, PHOTO, temperature=0, max_new_tokens=12
        )


@each_architecture
def test_another_image_or_system_message_shares_nothing_after_it(api_model: LoadedModel) -> None:
    image, other = data_url(PHOTO.read_bytes()), data_url(WIDE.read_bytes())
    with serving(api_model) as server, prefilled(api_model) as lengths:
        first = list(conversation(server, image))
        for url, system in ((other, "Be kind."), (image, "Be rude.")):
            lengths.clear()
            chat = Chat(api_model, system=system)
            for index, (answer, _) in enumerate(conversation(server, url, system)):
                shown = None if index else WIDE if url == other else PHOTO
                assert answer == chat.ask(QUESTIONS[index], shown, temperature=0, max_new_tokens=12)
                if index == 0:
                    assert lengths[0] > api_model.model.config.num_patches
        assert [answer for answer, _ in first] == [answer for answer, _ in conversation(server, image)]


@each_architecture
def test_a_stream_holds_the_same_answer(api: Server, loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    expected = chat.ask("Tell me a story", temperature=0, max_new_tokens=30)
    assert chat.last_answer is not None
    messages: list[Any] = [user("Tell me a story")]
    options: dict[str, Any] = {"model": "checkpoint", "messages": messages, "temperature": 0, "stream": True}
    chunks = list(
        api.client.chat.completions.create(**options, max_completion_tokens=30, stream_options={"include_usage": True})
    )
    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert len(pieces) > 5
    assert last.choices[0].finish_reason == chat.last_answer.finish_reason
    assert usage.choices == []
    assert usage.usage.completion_tokens == chat.last_answer.new_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    raw = api.post({**options, "max_tokens": 2})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")
    assert "usage" not in raw.text


@each_architecture
def test_several_answers_seeds_and_stops(api: Server, loaded: LoadedModel) -> None:
    body = {"model": "checkpoint", "messages": [user("hello")], "temperature": 1.5, "max_tokens": 10, "seed": 7}
    first = api.post({**body, "n": 3}).json()
    answers = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(answers)) == 3
    expected = [
        Chat(loaded).ask("hello", temperature=1.5, max_new_tokens=10, seed=7 + index, top_k=40) for index in range(3)
    ]
    assert answers == expected
    assert first["usage"]["completion_tokens"] == 30
    streamed = api.post({**body, "n": 3, "stream": True}).text
    texts = dict.fromkeys(range(3), "")
    for line in streamed.split("\n\n")[:-2]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert list(texts.values()) == answers
    whole = api.post({**body, "temperature": 0, "max_tokens": 30}).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    stopped = api.post({**body, "temperature": 0, "max_tokens": 30, "stop": [stop, "never said"]}).json()["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(stop)].strip()
    assert stopped["finish_reason"] == "stop"


def test_the_sampling_defaults_are_those_of_the_reference(api: Server, loaded: LoadedModel) -> None:
    body = {"model": "checkpoint", "messages": [user("hello")], "max_tokens": 20, "seed": 3}
    sampling: dict[str, Any] = {"top_p": 1.0, "max_new_tokens": 20, "seed": 3}
    for change, temperature, top_k in (({}, 0.9, 40), ({"top_k": 0}, 0.9, 0), ({"temperature": 2}, 2, 40)):
        answer = api.post(body | change).json()["choices"][0]["message"]["content"]
        assert answer == Chat(loaded).ask("hello", temperature=temperature, top_k=top_k, **sampling)


def test_all_text_parts_of_a_message_are_asked(api: Server) -> None:
    parts = [{"type": "text", "text": text} for text in ("hello", "And now?")]
    body = {"model": "checkpoint", **GREEDY}
    split = api.post(body | {"messages": [{"role": "user", "content": parts}]})
    assert split.json()["choices"] == api.post(body | {"messages": [user("hello\nAnd now?")]}).json()["choices"]


def test_a_model_is_retrieved_by_its_id(api: Server, api_model: LoadedModel) -> None:
    """Also through OpenAI's client, and an id with slashes, as a hub id has them."""
    assert api.client.models.retrieve("checkpoint") == api.client.models.list().data[0]
    for unknown in ("gpt-9", "checkpoint/", "a/checkpoint"):
        with pytest.raises(openai.NotFoundError) as caught:
            api.client.models.retrieve(unknown)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with serving(dataclasses.replace(api_model, name="01-ai/Yi-VL-6B")) as server:
        url, headers = f"{server.url}/v1/models", {"Authorization": f"Bearer {server.key}"}
        assert server.client.models.retrieve("01-ai/Yi-VL-6B").id == "01-ai/Yi-VL-6B"
        for path in ("01-ai/Yi-VL-6B", "01-ai%2FYi-VL-6B"):
            assert httpx.get(f"{url}/{path}", headers=headers).json()["id"] == "01-ai/Yi-VL-6B"
        missing = httpx.get(f"{url}/01-ai/Yi-VL-34B", headers=headers)
        assert missing.status_code == 404
        assert missing.json()["error"]["type"] == "invalid_request_error"


def test_the_model_list_health_and_metrics(api: Server) -> None:
    assert [model.id for model in api.client.models.list()] == ["checkpoint"]
    headers = {"Authorization": f"Bearer {api.key}"}
    for path in ("/v1/models", "/v1/models/"):  # no id is no model's id
        assert httpx.get(f"{api.url}{path}", headers=headers).json()["data"][0]["id"] == "checkpoint"
    assert httpx.get(f"{api.url}/health").json() == {"status": "ok"}
    for name in (
        "yivl_responses_total",
        "yivl_completion_tokens_total",
        "yivl_waiting 0.0",
        "yivl_first_token_seconds",
    ):
        assert name in metrics(api)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/checkpoint", "/metrics", "/openapi.json", "/nothing", "/v1/chat/completions"]
)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer secre", "Bearer secret2", "secret", "bearer \xff"])
def test_everything_but_health_needs_the_key(api: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = httpx.request("POST" if "chat" in path else "GET", f"{api.url}{path}", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt-9"}, 404, "model", "this server has checkpoint"),
        ({"tools": []}, 400, "tools", "not supported"),
        ({"logprobs": True}, 400, "logprobs", ""),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", ""),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type", ""),
        ({"temperature": -1}, 400, "temperature", ""),
        ({"temperature": 1e-9}, 400, None, "0.001"),
        ({"top_p": 0}, 400, "top_p", ""),
        ({"n": 99}, 400, "n", "at most 4"),
        ({"max_tokens": 10**6}, 400, "max_tokens", "at most 512"),
        ({"seed": -1}, 400, "seed", ""),
        ({"stop": ["a"] * 5}, 400, "stop", "stop: List should have at most 4 items"),
        ({"stop": "a" * 257}, 400, "stop", "stop: String should have at most 256 characters"),
        ({"stop": 5}, 400, "stop", "stop: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages.0.user.content.0", "'video'"),
        (
            {"messages": [{"role": "user", "content": [TEXT | {"a": 1}]}]},
            400,
            "messages.0.user.content.0",
            "not support",
        ),
        ({"messages": [{"role": "user", "content": [TEXT | {"text": 1}]}]}, 400, "messages.0.user.content.0", "string"),
        ({"messages": [user("a" * 900_000)]}, 400, "messages", "characters"),
        ({"messages": []}, 400, "messages", ""),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0", "'robot'"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, None, "alternate"),
        ({"messages": [user("a"), user("b")]}, 400, None, "alternate"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]}, 400, None, "alternate"),
        ({"messages": [{"role": "system", "content": "b"}]}, 400, None, "alternate"),
        ({"messages": [user("word " * 5000)]}, 400, "messages", "the context has 4096"),
        ({"messages": [user("a", *["data:image/png;base64,AAAA"] * 4)]}, 400, None, "at most 3 images"),
    ],
)
def test_unsupported_parameters_are_reported(
    api: Server, change: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = api.post({"model": "checkpoint", "messages": [user("hi")], **GREEDY, **change})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"]
    if param is not None:
        assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "must be a data: URL"),
        ("/etc/passwd", "must be a data: URL"),
        ("images/cat.jpg", "must be a data: URL"),
        ("http://127.0.0.1/a.png", "must be a data: URL"),
        ("https://example.org/a.png", "must be a data: URL"),
        ("data:text/plain;base64,AAAA", "must be a data: URL"),
        ("data:image/png,AAAA", "must be a data: URL"),
        ("data:image/png;base64,??", "not valid base64"),
        (data_url(b"nonsense"), "not a readable image; use JPEG, PNG, WebP, BMP or TIFF"),
        (
            data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "not a readable image; use JPEG, PNG, WebP, BMP or TIFF",
        ),
        (data_url(b""), "not a readable image; use JPEG, PNG, WebP, BMP or TIFF"),
        (data_url(PHOTO.read_bytes()[:2_000]), "damaged or truncated"),
        (data_url(png(40_000, 30_000)), "pixels"),
        (data_url(png(1_001, 1_000)), "more than 1,000,000 pixels"),
        (data_url(b"x" * 300_000), "at most 200,000 bytes"),
    ],
)
def test_bad_images_are_refused_with_an_error_that_reveals_nothing_of_the_server(
    api: Server, url: str, message: str
) -> None:
    response = api.post({"model": "checkpoint", "messages": [user("hi", url)], **GREEDY})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "0x" not in response.text


def test_the_scheme_of_the_key_is_case_insensitive(api: Server) -> None:
    """RFC 9110, section 11.1."""
    assert httpx.get(f"{api.url}/v1/models", headers={"Authorization": f"bearer {api.key}"}).status_code == 200


def test_the_key_is_checked_before_the_body_is_read(api: Server) -> None:
    response = httpx.post(f"{api.url}/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 401


def test_malformed_requests_are_refused(api: Server) -> None:
    headers = {"Authorization": f"Bearer {api.key}"}
    url = f"{api.url}/v1/chat/completions"
    as_json = {**headers, "Content-Type": "application/json"}
    for content, kind, status in (
        (b"{", as_json, 400),
        (b"[" * 100_000, as_json, 400),
        (b'{"model": NaN}', as_json, 400),
        (b"{}", headers | {"Content-Type": "text/plain"}, 400),
        (b"x" * 1_100_000, as_json, 413),
    ):
        response = httpx.post(url, content=content, headers=kind)
        assert (response.status_code, set(response.json())) == (status, {"error"})
    chunked = httpx.post(url, content=iter([b"x" * 100_000] * 11), headers=as_json)
    assert chunked.status_code == 413
    assert httpx.get(url, headers=headers).status_code == 405
    assert httpx.get(f"{api.url}/nothing", headers=headers).json()["error"]["message"] == "there is nothing here"


def test_a_question_of_megabytes_is_refused_before_its_image_is_read(api: Server) -> None:
    body = {"model": "checkpoint", "messages": [user("x" * 500_000, "data:image/png;base64,nothing")]}
    response = api.post(body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "the conversation has 500,000 characters" in response.json()["error"]["message"]


def test_the_name_of_an_unknown_parameter_is_cut(api: Server) -> None:
    response = api.post({"model": "checkpoint", "messages": [user("hi")], "a" * 10_000: 1})
    assert response.status_code == 400
    assert len(response.text) < 400


def test_a_long_value_is_not_sent_back(api: Server) -> None:
    response = api.post({"model": "checkpoint", "messages": [{"role": "r" * 10_000, "content": "hi"}]})
    assert response.status_code == 400
    assert len(response.text) < 400


def test_answers_may_be_sent_back_as_clients_store_them(api: Server) -> None:
    """``model_dump`` of OpenAI's client writes all fields."""
    unset = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    image = {"type": "image_url", "image_url": {"url": data_url(PHOTO.read_bytes()), "detail": None}}
    messages = [
        {"role": "user", "content": [image, TEXT], "name": None},
        {"role": "assistant", "content": "A boat."} | unset,
        user("and?"),
    ]
    options = {"include_usage": None, "include_obfuscation": False}
    body = {"model": "checkpoint", "messages": messages, "stream": True, "stream_options": options, **GREEDY}
    response = api.post(body)
    assert response.status_code == 200, response.text
    assert response.text.rstrip().endswith("data: [DONE]")


def test_connections_without_headers_or_readers_are_cut_off() -> None:
    """The body of a request is held until its answer is sent."""
    sent = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100000000")]})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(10**6), "more_body": True})
        await send({"type": "http.response.body"})
        sent.set()

    limits = Limits(max_receive_seconds=0.5, max_seconds=0.5)
    http = partial(Connection, limits=limits)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    address = server.servers[0].sockets[0].getsockname()
    head = b"GET / HTTP/1.1\r\nHost: x\r\n"
    with ExitStack() as stack:
        silent, half, deaf = (stack.enter_context(socket.create_connection(address)) for _ in range(3))
        deaf.sendall(head + b"\r\n")
        half.sendall(head)
        for client in (silent, half):
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert not sent.is_set()
        wait_until(sent.is_set)
    server.should_exit = True
    thread.join()


def test_half_a_second_request_is_cut_off_and_a_whole_one_is_answered(api_model: LoadedModel) -> None:
    limits = dataclasses.replace(LIMITS, max_receive_seconds=0.5)
    with serving(api_model, limits) as server, ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))))
        received, head = client.makefile("rb"), b"GET /health HTTP/1.1\r\nHost: x\r\n"
        for _ in range(2):
            client.sendall(head + b"\r\n")
            assert received.readline().startswith(b"HTTP/1.1 200 ")
            while received.readline().strip():
                pass
            assert received.read(15) == b'{"status":"ok"}'
        client.sendall(head)
        with suppress(ConnectionResetError):
            assert received.read(1) == b""


def test_bodies_have_a_time_and_a_size_together(api_model: LoadedModel) -> None:
    limits = dataclasses.replace(LIMITS, max_receive_seconds=0.5, max_total_bytes=100_000)
    with serving(api_model, limits) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        with socket.create_connection(address) as slow:
            slow.sendall(head + b"Content-Length: 1000\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address) as held:
            held.sendall(head + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000)
            wait_until(
                lambda: (
                    httpx.post(
                        f"{server.url}/v1/chat/completions",
                        content=b" " * 30_000,
                        headers={"Authorization": "Bearer secret"},
                    ).status_code
                    == 429
                )
            )
        wait_until(lambda: server.post({"model": "other", "messages": [user("x" * 30_000)]}).status_code == 404)


def test_large_bodies_leave_room_for_small_ones() -> None:
    """Clients that send large bodies slowly would keep all others out."""
    limits = Limits(max_body_bytes=2**23, max_total_bytes=2**24)

    async def send(guard: Guard, sizes: list[int], hold: asyncio.Event) -> bool:
        """Return whether a body, sent in parts, is received; it is held until the event."""
        parts: list[Any] = [{"type": "http.request", "body": bytes(size), "more_body": True} for size in sizes]

        async def receive() -> Any:
            return parts.pop(0)

        async def ignore(_: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        try:
            await guard({**scope, "received": hold}, receive, ignore)
        except HTTPException as error:
            return error.status_code != 429
        return True

    async def app(scope: Any, receive: Any, _: Any) -> None:
        for _ in range(2):
            await receive()
        await scope["received"].wait()

    async def check() -> None:
        guard, end, done = (
            Guard(app, api_key=None, limits=limits, metrics=MagicMock()),
            asyncio.Event(),
            asyncio.Event(),
        )
        done.set()
        held = asyncio.create_task(send(guard, [2**22, 2**22], end))
        await asyncio.sleep(0)
        assert await send(guard, [2**22, 2**21], done)  # 14 of the 16 MiB
        other = asyncio.create_task(send(guard, [2**22, 2**21], end))
        await asyncio.sleep(0)
        assert not await send(guard, [2**20, 1], done)
        assert await send(guard, [2**19, 2**19], done)
        end.set()
        assert await held
        assert await other
        assert await send(guard, [2**22, 2**22], done)

    asyncio.run(check())


def test_a_client_that_leaves_before_the_stream_begins_cancels_its_answer(talkative: LoadedModel) -> None:
    async def leave(exchange: Exchange) -> None:
        class Connected:
            async def receive(self) -> Any:
                await asyncio.sleep(3600)

        async def disconnect() -> Any:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            await asyncio.sleep(3600)

        response = await exchange.stream(Connected())  # type: ignore[arg-type]
        await response({"type": "http"}, disconnect, send)

    async def ask() -> None:
        body = ChatRequest(
            model="checkpoint", messages=[UserMessage(role="user", content="hello")], max_tokens=3000, stream=True
        )
        deadline = asyncio.get_running_loop().time() + 60
        exchange = Exchange(body, Limits(max_tokens=3000), scheduler, deadline, Metrics(scheduler))
        exchange.submit("Be kind.", [Turn("hello")], [[]])
        await leave(exchange)
        assert exchange._cancelled.is_set()

    scheduler = Scheduler(talkative, Limits())
    asyncio.run(ask())
    wait_until(lambda: not scheduler.num_running, 20)
    scheduler.close()


def test_an_answer_that_outlasts_the_shutdown_ends_with_an_error(talkative: LoadedModel) -> None:
    limits = Limits(shutdown_seconds=1, max_tokens=4000)
    scheduler = Scheduler(talkative, limits)
    server, listeners = StoppableServer(build_app(scheduler, limits), scheduler, limits), bind("127.0.0.1", 0, "--port")
    url = f"http://127.0.0.1:{listeners[0].getsockname()[1]}/v1/chat/completions"
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
    thread.start()
    wait_until(lambda: server.started)
    body = {"model": "checkpoint", "messages": [user("hello")], "temperature": 0, "max_tokens": 3900, "n": 4}
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as stream, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, url, json=body, timeout=60)
        lines = stream.iter_lines()
        next(lines)
        wait_until(lambda: scheduler.num_running == 8)
        server.should_exit = True
        *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert (whole.result().status_code, whole.result().headers["retry-after"]) == (503, "5")
    thread.join()


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        for command in (["-m", "yivl.serve.api", "--port", port], ["web_demo.py", "--server-port", port]):
            result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
            assert result.returncode == 2
            assert f"127.0.0.1:{port} cannot be listened on (Address already in use); choose another" in result.stderr
            assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0..1", "a" * 64])
def test_what_is_no_name_of_a_host_is_one_line(host: str) -> None:
    with pytest.raises(YiVLError, match=r"^--host: .*:0 cannot be listened on \(.*\); choose another$"):
        bind(host, 0, "--host")


def test_a_slow_host_of_images_keeps_no_other_request_waiting(
    api_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def fetch(self: Fetcher, url: str) -> bytes:
        assert release.wait(60)
        return PHOTO.read_bytes()

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    scheduler = Scheduler(api_model, limits := dataclasses.replace(LIMITS, max_batch=1))
    app = build_app(scheduler, limits, remote_hosts=("example.com",))
    body = {"model": "checkpoint", **GREEDY}
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        slow = body | {"messages": [user("What is this?", "https://example.com/image.jpg")]}
        answer = pool.submit(client.post, "/v1/chat/completions", json=slow)
        wait_until(lambda: answer.running())
        for messages in ([user("hi")], [user("What is this?", data_url(PHOTO.read_bytes()))]):
            assert client.post("/v1/chat/completions", json=body | {"messages": messages}).status_code == 200
        assert not answer.done()
        release.set()
        assert answer.result().status_code == 200


def test_a_port_that_another_server_takes_while_the_model_is_loaded_is_one_line(api_model: LoadedModel) -> None:
    """``SO_REUSEADDR`` lets both servers bind it."""
    listeners = bind("127.0.0.1", 0, "--port")
    scheduler = Scheduler(api_model, LIMITS)
    server = StoppableServer(build_app(scheduler, LIMITS), scheduler, LIMITS)
    (other,) = bind("127.0.0.1", listeners[0].getsockname()[1], "--port")
    with other:
        other.listen()
        with pytest.raises(
            YiVLError, match=r"^--port: cannot be listened on \(Address already in use\); choose another$"
        ):
            server.run(sockets=listeners)
    with pytest.raises(ShuttingDown):
        scheduler.submit([])  # its thread has ended, so the process ends too
    listeners[0].close()


def test_all_addresses_of_a_name_are_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(*names: str) -> None:
        families = [(socket.AF_INET6 if ":" in name else socket.AF_INET, name) for name in names]
        found = [(family, socket.SOCK_STREAM, 6, "", (name, 0)) for family, name in families for _ in range(2)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    addresses("127.0.0.1", "127.0.0.2", "2001:db8::1")  # the last is of no interface, as ::1 without IPv6
    first, second = bind("name", 0, "--host")
    with first, second:
        assert (first.getsockname()[0], second.getsockname()[0]) == ("127.0.0.1", "127.0.0.2")
        assert first.getsockname()[1] == second.getsockname()[1]
    addresses("2001:db8::1")
    with pytest.raises(YiVLError, match=r"^--host: name:0 cannot be listened on"):
        bind("name", 0, "--host")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_an_ipv6_address_is_not_listened_on_with_ipv4() -> None:
    (listener,) = bind("::", 0, "--host")
    with listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_disconnected_client_cancels_its_answer(talkative: LoadedModel) -> None:
    body = {"model": "checkpoint", "messages": [user("Tell me a story")], "temperature": 0, "max_tokens": 2000}
    with serving(talkative, Limits()) as server:
        url, headers = f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {server.key}"}
        with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=60) as stream:
            next(stream.iter_lines())
        server.wait_until_idle()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body | {"n": 4}, headers=headers, timeout=0.5)
        server.wait_until_idle()
        assert server.post(body | {"max_tokens": 2}).status_code == 200
        assert "yivl_completion_tokens_total 2.0" in metrics(server)  # only that of the last one was finished


def test_limits_are_flags() -> None:
    parser = argparse.ArgumentParser()
    Limits.add_flags(parser, "api")
    given = parser.parse_args(["--max-seconds", "0.5", "--max-queue", "3"])
    assert Limits.from_flags(given) == Limits(max_seconds=0.5, max_queue=3)
    off = Limits.from_flags(parser.parse_args(["--max-cache-bytes", "0"]))
    assert off.max_cache_bytes == 0
    for name, expected in (("max_cache_bytes", "at least 0"), ("prefill_chunk", "more than 0")):
        with pytest.raises(YiVLError, match=f"{name}=-1; expected {expected}"):
            Limits(**{name: -1})


def test_null_fields_have_their_default(api: Server) -> None:
    body = {"model": "checkpoint", "messages": [user("hello")], **GREEDY}
    nothing = dict.fromkeys(["top_p", "n", "stream", "stop", "seed", "presence_penalty", "response_format", "user"])
    assert api.post(body | nothing).json()["choices"] == api.post(body).json()["choices"]


def test_cancelled_requests_leave_the_queue(talkative: LoadedModel) -> None:
    scheduler = Scheduler(talkative, Limits(max_queue=2, max_batch=1))
    ended = threading.Event()

    def request(max_new_tokens: int) -> Request:
        cancelled = threading.Event()
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        return Request(
            images=[],
            begin=lambda images: Chat(talkative).begin("hello", images, stop_event=cancelled, **sampling),
            on_event=lambda event: ended.set() if isinstance(event, GenerationState) else None,
            cancelled=cancelled,
        )

    running = request(2000)
    scheduler.submit([running])
    wait_until(lambda: scheduler.num_running)
    left = [request(5), request(5)]
    scheduler.submit(left)
    assert scheduler.is_full
    with pytest.raises(Overloaded):
        scheduler.submit([request(5)])
    for one in left:
        one.cancelled.set()
    scheduler.submit([request(5)])
    running.cancelled.set()
    assert ended.wait(30)
    scheduler.close()


def test_a_full_queue_and_a_timeout_are_reported(talkative: LoadedModel) -> None:
    body = {"model": "checkpoint", "messages": [user("Tell me a story")], "temperature": 0, "max_tokens": 2000}
    with serving(talkative, Limits(max_queue=1, max_batch=1)) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.post, body | {"max_tokens": 1000})]
        wait_until(lambda: server.scheduler.num_running)
        answers.append(pool.submit(server.post, body | {"max_tokens": 2}))
        wait_until(lambda: server.scheduler.num_waiting)
        full = server.post(body)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) > 0
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert [answer.result().status_code for answer in answers] == [200, 200]
    with serving(talkative, Limits(max_seconds=1)) as server:
        late = server.post({**body, "n": 4})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        streamed = server.post({**body, "n": 4, "stream": True})
        assert streamed.status_code in (200, 504)
        assert "took too long" in streamed.text
        server.wait_until_idle()


def test_a_stopped_server_finishes_its_streams(api_model: LoadedModel) -> None:
    body = {"model": "checkpoint", "messages": [user("Tell me a story")], "temperature": 0, "max_tokens": 200}
    with serving(api_model) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, headers=headers, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = list(lines)
    assert "data: [DONE]" in rest
    assert server.scheduler.num_running == 0


@pytest.mark.slow
def test_a_terminated_server_finishes_its_streams(tmp_path: Path) -> None:
    folder, port = talkative_checkpoint(tmp_path / "checkpoint"), free_port()
    command = [sys.executable, "-m", "yivl.serve.api", "--model-path", str(folder), "--port", str(port)]
    body = {"model": "checkpoint", "messages": [user("hello")], "temperature": 0, "max_tokens": 1000, "stream": True}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: process.poll() is not None or answers_health(port))
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            rest = list(lines)
    assert "data: [DONE]" in rest


def answers_health(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_out_of_memory_is_reported_and_the_server_continues(
    api: Server, api_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "checkpoint", "messages": [user("hello")], **GREEDY}
    expected = api.post(body).json()["choices"]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate at 0xdeadbeef")

    monkeypatch.setattr(api_model.model.lm_head, "forward", fail)
    for stream in (False, True):
        response = api.post(body | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")
        assert "0xdeadbeef" not in response.text
    monkeypatch.setattr(api_model.model.lm_head, "forward", lambda *_: 1 / 0)
    assert api.post(body).json()["error"]["message"] == "the server failed to answer"
    monkeypatch.undo()
    assert api.post(body).json()["choices"] == expected


@each_architecture
def test_many_clients_get_their_own_answers(api: Server, loaded: LoadedModel) -> None:
    """Good and bad requests at once: nothing hangs, leaks or is mixed up."""
    images = [None, PHOTO, WIDE]
    cases = [(question, image) for question in QUESTIONS for image in images]
    expected = {
        case: Chat(loaded).ask(case[0], case[1], temperature=0, max_new_tokens=3 + number)
        for number, case in enumerate(cases)
    }
    urls = {image: data_url(image.read_bytes()) for image in (PHOTO, WIDE)}

    def ask(number: int) -> None:
        index = number % len(cases)
        question, image = cases[index]
        message = user(question, *([urls[image]] if image else []))
        body = {"model": "checkpoint", "messages": [message], "temperature": 0, "max_tokens": 3 + index}
        if number % 5 == 0:
            bad: list[dict[str, Any]] = [
                {"model": "none"},
                {"messages": [user("hi", "file:///etc/passwd")]},
                {"messages": [user("word " * 5000)]},
                {"n": 0},
            ]
            assert api.post(body | bad[number // 5 % len(bad)]).status_code in (400, 404)
        elif number % 5 == 1:
            text = ""
            for line in api.post(body | {"stream": True}).text.split("\n\n")[:-2]:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
            assert text == expected[cases[index]]
        else:
            assert api.post(body).json()["choices"][0]["message"]["content"] == expected[cases[index]]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(200)))
    api.wait_until_idle()


def test_the_log_holds_nothing_that_clients_wrote(api: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        api.post({"model": "checkpoint", "messages": [user("my private question")], **GREEDY})
        api.post({"model": "private", "messages": [user("my private question")], "private": 1})
    lines = [record.getMessage() for record in caplog.records if record.name == "yivl.serve.metrics"]
    assert any(json.loads(line)["event"] == "answer" for line in lines)
    assert "private" not in caplog.text


def test_closing_the_scheduler_fails_queued_and_running_requests(talkative: LoadedModel) -> None:
    async def ask(server: Server) -> list[int]:
        async with httpx.AsyncClient(timeout=60, headers={"Authorization": f"Bearer {server.key}"}) as client:
            body = {"model": "checkpoint", "messages": [user("hello")], "temperature": 0, "max_tokens": 2000}
            asked = [asyncio.create_task(client.post(f"{server.url}/v1/chat/completions", json=body)) for _ in range(4)]
            while server.scheduler.num_running + server.scheduler.num_waiting < 4:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(server.scheduler.close)
            return [(await one).status_code for one in asked]

    with serving(talkative, Limits(max_batch=2)) as server:
        assert asyncio.run(ask(server)) == [503] * 4


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_responses_match_the_openapi_description(api: Server, mode: schemathesis.GenerationMode) -> None:
    """Requests made from the server's own description, as it asks for and as it does not."""
    headers = {"Authorization": f"Bearer {api.key}"}
    raw = httpx.get(f"{api.url}/openapi.json", headers=headers).json()
    # With these values most requests pass the first checks, and their answers are short.
    body = raw["components"]["schemas"]["ChatRequest"]
    body["properties"]["model"] = {"const": "checkpoint"}
    body["properties"]["messages"]["maxItems"] = 1
    body["properties"]["n"]["maximum"] = 2
    for name in ("max_tokens", "max_completion_tokens"):
        body["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 3}
        body["required"].append(name)
    operation = schemathesis.openapi.from_dict(raw)["/v1/chat/completions"]["POST"]
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: schemathesis.Case) -> None:
        response = case.call(base_url=api.url, headers=headers, timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    check()
    assert statuses.keys() <= {200, 400, 404}  # 404: another model than the one of the description
    assert mode == schemathesis.GenerationMode.NEGATIVE or statuses[200] > 0
    assert mode == schemathesis.GenerationMode.POSITIVE or statuses[400] > 0


@pytest.mark.slow
def test_memory_stays_flat(api: Server) -> None:
    photos = [data_url(png(50 + number, 50), "png") for number in range(40)]

    def ask(number: int) -> None:
        body = {"model": "checkpoint", "messages": [user(f"hi {number}", photos[number % 40])], **GREEDY}
        assert api.post(body).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))
        before = resident_mebibytes()
        list(pool.map(ask, range(1_000)))
    assert resident_mebibytes() - before < 64


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_memory_of_large_bodies_is_returned(loaded: LoadedModel) -> None:
    received = threading.Barrier(6)

    def body() -> Iterator[bytes]:
        yield from (b" " * 2**16 for _ in range(50 * 2**4))
        received.wait()  # so that all are held at the same time
        yield b"no JSON"

    with serving(loaded, dataclasses.replace(LIMITS, max_body_bytes=2**26)) as api, ThreadPoolExecutor(6) as pool:

        def send(_: int) -> int:
            headers = {"Authorization": f"Bearer {api.key}"}
            return httpx.post(f"{api.url}/v1/chat/completions", content=body(), headers=headers, timeout=60).status_code

        assert api.post({}).status_code == 400
        before = resident_mebibytes()
        assert list(pool.map(send, range(6))) == [400] * 6
        wait_until(lambda: resident_mebibytes() - before < 64, seconds=10)


def resident_mebibytes() -> float:
    """Return the memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
