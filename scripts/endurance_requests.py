"""Endurance of the API: thousands of valid, malformed and hostile requests from several clients to one server.

python scripts/endurance_requests.py --figure docs/endurance-memory.png

The server runs the golden checkpoint. Every valid question has a known greedy answer, from a request that was sent
alone. ``--short`` sends a few hundred requests. ``scripts/endurance.py`` runs this campaign with the others.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from endurance_report import Outcome
from hostile_requests import BAD_BODIES, BAD_IMAGES, GOOD_IMAGES, data_url

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = ROOT / "tests/golden/checkpoint"
NUM_REQUESTS: Final = {False: 10_000, True: 240}
CLIENTS: Final = 6
TIMEOUT: Final = 60.0
"""Seconds after which a request counts as hung."""
QUESTIONS: Final = tuple(f"{word} {number}" for number in range(8) for word in ("What is", "图片里有什么", "Tell me"))
ALLOWED_GROWTH: Final = 32
"""MiB between the medians of the second and of the last quarter: less than one large image. Source: ours."""
KINDS: Final = {
    "text": 30,
    "image": 16,
    "turns": 10,
    "stream": 12,
    "bad_image": 16,
    "bad_body": 8,
    "disconnect": 4,
    "path": 2,
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
PLATEAU: Final = "the memory of the server reaches a plateau"
ALIVE: Final = "the server answers as before after the campaign"
CLEAN_LOG: Final = "the log of the server has no traceback"


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


def chat_body(*messages: dict[str, Any], max_tokens: int = 6, stream: bool = False) -> dict[str, Any]:
    """Return the body of a request for a greedy answer."""
    greedy = {"temperature": 0, "max_tokens": max_tokens, "stream": stream}
    return {"model": MODEL.name, "messages": list(messages), **greedy}


def raw_request(body: dict[str, Any]) -> bytes:
    """Return a request as it is on the wire."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + content


@contextmanager
def api_server(log: Path) -> Iterator[tuple[str, int]]:
    """Start the API in a process of its own; yield its URL and process id."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "yivl.serve.api", "--model-path", str(MODEL), "--device", "cpu"]
    # Limits that are reached within a campaign: without them the prefixes alone would grow over 10,000 requests.
    limits = ["--max-cache-bytes", str(2**24), "--max-queue", "24", "--max-batch", "8", "--max-encoded-images", "4"]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--port", str(port), *limits], stderr=stderr, env=environment)
    try:
        wait_for(lambda: process.poll() is None and is_healthy(url))
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def is_healthy(url: str) -> bool:
    """Return whether the server accepts requests."""
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def wait_for(state: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for a state.

    Raises:
        TimeoutError: If it is not reached in time.
    """
    end = time.monotonic() + seconds
    while not state():
        if time.monotonic() > end:
            raise TimeoutError("the server did not start")
        time.sleep(0.05)


def resident_mebibytes(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(budget_seconds: float, short: bool, figure: Path | None = None) -> list[Outcome]:
    """Run the campaign.

    Args:
        budget_seconds: Requests are sent until this time is over.
        short: A few hundred requests instead of 10,000.
        figure: File for the figure of the memory over the requests; ``None`` draws none.

    Returns:
        The outcome of each promise.
    """
    end, tally, memory = time.monotonic() + budget_seconds, Tally(), []
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        with api_server(log) as (url, pid):
            client = Client(url, tally)
            client.learn()
            num_sent = 0
            for part in range(NUM_REQUESTS[short] // 40):
                if time.monotonic() > end:
                    break
                chance = random.Random(part)
                kinds = chance.choices(list(KINDS), list(KINDS.values()), k=40)
                with ThreadPoolExecutor(CLIENTS) as pool:
                    for future in [pool.submit(client.send, kind, random.Random(chance.random())) for kind in kinds]:
                        future.result()
                num_sent += len(kinds)
                if part % 50 == 3:
                    client.burst(48)
                memory.append((num_sent, resident_mebibytes(pid)))
            for key, body in list(client._valid()):
                tally.add(ALIVE, client._answer(client._post(body)) == client.expected[key], key)
        text = log.read_text(encoding="utf-8")
    tally.add(CLEAN_LOG, "Traceback" not in text, text[text.find("Traceback") :][:2000])
    growth = plateau_growth([value for _, value in memory])
    tally.add(PLATEAU, growth <= ALLOWED_GROWTH, f"grew by {growth:.0f} MiB")
    if figure is not None:
        draw(memory, figure)
    notes = f"{memory[0][1]:.0f} MiB at first, at most {max(value for _, value in memory):.0f}, growth {growth:.0f}"
    return [
        *(tally.outcome(promise) for promise in (NO_5XX, ANSWERED, OWN_ANSWER, REFUSED, OVERLOAD)),
        tally.outcome(PLATEAU, f"{num_sent:,} requests; {notes}"),
        *(tally.outcome(promise) for promise in (ALIVE, CLEAN_LOG)),
    ]


def plateau_growth(values: list[float]) -> float:
    """Return the median of the last quarter minus that of the second one."""
    quarter = max(len(values) // 4, 1)
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter] or values)


def draw(memory: list[tuple[int, float]], path: Path) -> None:
    """Write the figure of resident memory over requests."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(*zip(*memory, strict=True))
    axes.set(xlabel="requests", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the campaign and print its outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few hundred requests")
    parser.add_argument("--minutes", type=float, default=15.0, help="(default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="file for the figure of the memory")
    arguments = parser.parse_args()
    outcomes = run(60 * arguments.minutes, arguments.short, arguments.figure)
    for one in outcomes:
        print(f"{one.held}/{one.tried}  {one.promise}  {one.notes}")
    sys.exit(any(one.held < one.tried for one in outcomes))


if __name__ == "__main__":
    main()
