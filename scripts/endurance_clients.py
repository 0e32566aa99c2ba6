"""Clients that send valid, malformed and hostile requests to the API, and what they saw."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from endurance_report import Outcome
from hostile_requests import BAD_BODIES, BAD_IMAGES, GOOD_IMAGES, data_url

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "tests/golden/checkpoint"
TIMEOUT: Final = 60.0
"""Seconds after which a request counts as hung."""
QUESTIONS: Final = tuple(f"{word} {number}" for number in range(8) for word in ("What is", "图片里有什么", "Tell me"))
KINDS: Final = {
    "text": 24,
    "image": 9,
    "turns": 8,
    "stream": 8,
    "bad_image": 24,
    "bad_body": 16,
    "disconnect": 5,
    "path": 4,
    "slow": 1,
    "long_question": 0.5,
    "large_body": 0.5,
}
"""Kinds of requests and their weights."""


@dataclass
class Tally:
    """What the clients saw."""

    tried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, promise: str, holds: bool, example: object = "") -> None:
        """Record one trial of a promise."""
        with self.lock:
            self.tried[promise] += 1
            if not holds:
                self.failed[promise] += 1
                self.examples.setdefault(promise, str(example)[:300])

    def outcome(self, promise: str, notes: str = "") -> Outcome:
        """Return the outcome of a promise; the first failure is its note."""
        notes = self.examples.get(promise, notes)
        return Outcome(promise, self.tried[promise], self.tried[promise] - self.failed[promise], notes)


NO_5XX: Final = "no response of the API is a 5xx"
ANSWERED: Final = "every request to the API is answered or refused; none hangs"
OWN_ANSWER: Final = "a valid request gets its own answer under load"
REFUSED: Final = "a malformed request is refused with a 4xx of one line"
OVERLOAD: Final = "beyond the queue a request gets 429, and all others their answers"
ALIVE: Final = "the server answers as before after the campaign"


class Client:
    """Sends requests of all kinds and checks the responses; for several threads."""

    def __init__(self, url: str, tally: Tally) -> None:
        self.url = url
        self.tally = tally
        self.expected: dict[str, str] = {}
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))
        self._images = [data_url(data) for data in GOOD_IMAGES]

    def learn(self) -> None:
        """Record the answer to every valid question, asked alone."""
        for key, body in self._valid():
            self.expected[key] = self._answer(self._post(body))

    def _valid(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, question in enumerate(QUESTIONS):
            yield f"text {index}", chat_body(user(question))
            yield f"image {index}", chat_body(user(question, self._images[index % len(self._images)]))
            earlier = [user(QUESTIONS[index - 1]), {"role": "assistant", "content": f"answer {index}"}]
            yield f"turns {index}", chat_body(*earlier, user(question))

    def send(self, kind: str, chance: random.Random) -> None:
        """Send one request of a kind."""
        try:
            getattr(self, f"_{kind}")(chance)
            self.tally.add(ANSWERED, holds=True)
        except httpx.HTTPError as error:
            self.tally.add(ANSWERED, False, f"{kind}: {error!r}")
        except OSError as error:
            self.tally.add(ANSWERED, False, f"{kind}: {error!r}")

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        return self._checked(self._http.post("/v1/chat/completions", json=body))

    def _checked(self, response: httpx.Response) -> httpx.Response:
        self.tally.add(NO_5XX, response.status_code < 500, f"{response.status_code}: {response.text[:200]}")
        return response

    @staticmethod
    def _answer(response: httpx.Response) -> str:
        if not response.is_success:
            return f"{response.status_code} {response.text}"
        return str(response.json()["choices"][0]["message"]["content"])

    def _ask(self, kind: str, chance: random.Random) -> None:
        index = chance.randrange(len(QUESTIONS))
        key, body = list(self._valid())[3 * index + ("text", "image", "turns").index(kind)]
        answer = self._answer(self._post(body))
        self.tally.add(OWN_ANSWER, answer == self.expected[key], f"{key}: {answer!r}, not {self.expected[key]!r}")

    def _text(self, chance: random.Random) -> None:
        self._ask("text", chance)

    def _image(self, chance: random.Random) -> None:
        self._ask("image", chance)

    def _turns(self, chance: random.Random) -> None:
        self._ask("turns", chance)

    def _stream(self, chance: random.Random) -> None:
        key, body = chance.choice(list(self._valid()))
        text = ""
        with self._http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            if response.is_error:
                response.read()
            self.tally.add(NO_5XX, response.status_code < 500, f"{response.status_code} of a stream")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
        self.tally.add(OWN_ANSWER, text == self.expected[key], f"stream {key}: {text!r}, not {self.expected[key]!r}")

    def _refusal(self, response: httpx.Response, name: str) -> None:
        """Check that a request was refused in OpenAI's form, in one line."""
        self._checked(response)
        try:
            message = response.json()["error"]["message"]
            holds = 400 <= response.status_code < 500 and bool(message) and "\n" not in message and len(message) < 300
        except (ValueError, KeyError, TypeError):
            holds = False
        self.tally.add(REFUSED, holds, f"{name}: {response.status_code} {response.text[:200]}")

    def _bad_image(self, chance: random.Random) -> None:
        name, data = chance.choice(BAD_IMAGES)
        body = chat_body(user(chance.choice(QUESTIONS), data_url(data)))
        self._refusal(self._http.post("/v1/chat/completions", json=body), f"image {name}")

    def _bad_body(self, chance: random.Random) -> None:
        body = chance.choice(BAD_BODIES)
        headers = {"Content-Type": "application/json"}
        self._refusal(self._http.post("/v1/chat/completions", content=body, headers=headers), f"body {body[:60]!r}")

    def _path(self, chance: random.Random) -> None:
        path = chance.choice(
            ("/", "/v1", "/v1/models/x", "/etc/passwd", "/%00", "/v1/chat/completions", "/" + "a" * 5000)
        )
        self._refusal(self._http.get(path), f"path {path[:40]}")

    def _long_question(self, chance: random.Random) -> None:
        text = chance.choice(("word ", "你好", "#", "\n")) * 10_000_000
        self._refusal(self._post_quietly(chat_body(user(text[:10_000_000]))), "question of 10 MB")

    def _large_body(self, chance: random.Random) -> None:
        blocks = (b" " * 2**20 for _ in range(65))
        try:
            response = self._http.post("/v1/chat/completions", content=blocks)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return  # the server may close the connection instead of reading the rest
        self._refusal(response, "body of 65 MiB")

    def _post_quietly(self, body: dict[str, Any]) -> httpx.Response:
        return self._http.post("/v1/chat/completions", json=body)

    def _disconnect(self, chance: random.Random) -> None:
        """Leave in the middle of an answer, of a stream or of the body."""
        body = chat_body(user(chance.choice(QUESTIONS)), max_tokens=200, stream=chance.random() < 0.5)
        with self._connect() as connection:
            raw = raw_request(body)
            connection.sendall(raw[: chance.choice((len(raw), len(raw), len(raw) // 2, 20))])
            connection.settimeout(chance.random() * 0.05 + 0.001)
            try:
                connection.recv(chance.choice((1, 100, 1000)))
            except TimeoutError:
                return

    def _slow(self, chance: random.Random) -> None:
        """Send a request byte by byte, and read its answer slowly."""
        index = chance.randrange(len(QUESTIONS))
        raw = raw_request(chat_body(user(QUESTIONS[index])))
        received = b""
        with self._connect() as connection:
            for start in range(0, len(raw), 20):
                connection.sendall(raw[start : start + 20])
                time.sleep(0.01)
            while block := connection.recv(64):
                received += block
        answer = json.loads(received.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
        self.tally.add(OWN_ANSWER, answer == self.expected[f"text {index}"], f"slow: {received[:100]!r}")

    def _connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=TIMEOUT)

    def check_alive(self) -> None:
        """Check that every valid question still has its answer."""
        for key, body in self._valid():
            answer = self._answer(self._post(body))
            self.tally.add(ALIVE, answer == self.expected[key], f"{key}: {answer!r}")

    def burst(self, num_requests: int) -> None:
        """Send more requests at once than the server queues."""
        body = chat_body(user("Tell me a story"), max_tokens=100)

        def ask(_: int) -> None:
            response = self._post(body)
            self.tally.add(OVERLOAD, response.status_code in (200, 429), response.text)
            self.tally.add(ANSWERED, holds=True)

        with ThreadPoolExecutor(num_requests) as pool:
            list(pool.map(ask, range(num_requests)))


def user(text: str, *urls: str) -> dict[str, Any]:
    """Return a message with a question and images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}] if urls else text}


def chat_body(*messages: dict[str, Any], max_tokens: int = 3, stream: bool = False) -> dict[str, Any]:
    """Return the body of a request for a greedy answer."""
    greedy = {"temperature": 0, "max_tokens": max_tokens, "stream": stream}
    return {"model": MODEL.name, "messages": list(messages), **greedy}


def raw_request(body: dict[str, Any]) -> bytes:
    """Return a request as it is on the wire."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + content
