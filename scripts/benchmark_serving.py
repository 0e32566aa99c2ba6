"""Measure throughput, time to first token and interruptions of the API, for a randomly initialized Yi-VL.

python scripts/benchmark_serving.py --shape medium --dtype bfloat16

All figures are measured over HTTP in one run: tokens per second of 1 client and of --clients clients, alternately; the
time to first token of the turns of a stateless client, and of clients that ask about one image; the longest gap
between two pieces of a stream while others join with images. Every answer has --new-tokens tokens: the weights are
changed so that no answer stops early, and that every token is text of its own.
"""

import argparse
import base64
import json
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmark_inference import QUESTIONS, machine, rounded
from random_models import GOLDEN, SHAPES, write_random_checkpoint

MEASUREMENTS = ("text", "image", "turns", "shared_image", "gaps")
TURN_TOKENS = 32  # of the answers whose time to first token is measured


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    from yivl.serve.limits import Limits

    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="medium", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill-chunk", type=int, default=Limits().prefill_chunk, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=MEASUREMENTS, choices=MEASUREMENTS, help="(default: all)")
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()

    import torch

    from yivl.checkpoint.loading import load_model

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(arguments.shape, arguments.dtype, folder)
        loaded = load_model(folder, device=arguments.device)
    with torch.no_grad():
        loaded.model.lm_head.weight[unwanted_tokens(loaded.tokenizer)] = 0
    results: dict[str, Any] = {
        "machine": machine(arguments.device),
        **{name: getattr(arguments, name) for name in ("shape", "dtype", "new_tokens", "clients", "prefill_chunk")},
    }
    with serving(loaded, arguments) as url:
        client = Client(url, arguments.new_tokens)
        client.ask("warm up")
        client.ask("warm up", new_image())
        for name in arguments.only:
            if name in ("text", "image"):
                results[name] = measure_throughput(client, arguments, with_image=name == "image")
            elif name == "turns":
                results[name] = measure_turns(client, arguments.repeats)
            elif name == "shared_image":
                results[name] = measure_shared_image(client, arguments)
            else:
                results[name] = measure_gaps(client, arguments)
    print(json.dumps(rounded(results), indent=2))


def unwanted_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that would end an answer, or whose text is held back until the next one."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [
        token for token, text in enumerate(texts) if "#" in text or "\ufffd" in text or not text or text != text.strip()
    ]


@contextmanager
def serving(loaded: Any, arguments: argparse.Namespace) -> Iterator[str]:
    """Serve the model and yield the URL of its chat completions."""
    import uvicorn

    from yivl.serve.app import build_app
    from yivl.serve.limits import Limits
    from yivl.serve.scheduler import Scheduler

    limits = Limits(max_batch=arguments.clients, prefill_chunk=arguments.prefill_chunk)
    app = build_app(Scheduler(loaded, limits), limits)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/chat/completions"
    finally:
        server.should_exit = True  # else its thread keeps the process alive after an error
        thread.join()


class Client:
    """A stateless client of the API, for several threads."""

    def __init__(self, url: str, new_tokens: int) -> None:
        import httpx

        self._http = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))
        self._url = url
        self._new_tokens = new_tokens

    def ask(self, question: str, image: str | None = None) -> int:
        """Ask and return the number of generated tokens."""
        body = self._body([message(question, image)], self._new_tokens)
        usage = self._http.post(self._url, json=body).raise_for_status().json()["usage"]
        assert usage["completion_tokens"] == self._new_tokens
        return self._new_tokens

    def stream(self, messages: list[Any], new_tokens: int) -> Iterator[tuple[float, str]]:
        """Yield the pieces of an answer, each with the seconds since the request."""
        start = time.perf_counter()
        body = self._body(messages, new_tokens) | {"stream": True}
        with self._http.stream("POST", self._url, json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
                    if piece:
                        yield time.perf_counter() - start, piece

    @staticmethod
    def _body(messages: list[Any], new_tokens: int) -> dict[str, Any]:
        return {"model": "model", "messages": messages, "temperature": 0, "max_tokens": new_tokens}


def new_image() -> str:
    """Return the data URL of an image that the server has not seen."""
    # Bytes after the end of a JPEG only change its digest, so that the server encodes every image.
    photo = (GOLDEN / "images/photo_rgb.jpg").read_bytes() + secrets.token_bytes(8)
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"


def message(question: str, image: str | None = None) -> dict[str, Any]:
    """Return a message of the user."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": image}})
    return {"role": "user", "content": content}


def measure_throughput(client: Client, arguments: argparse.Namespace, *, with_image: bool) -> dict[str, float]:
    """Return tokens per second of one client and of several, medians, and their ratio."""
    alone, together = [], []
    for _ in range(arguments.repeats):
        alone.append(throughput(client, 1, with_image=with_image))
        together.append(throughput(client, arguments.clients, with_image=with_image))
    one, several = statistics.median(alone), statistics.median(together)
    return {"one_client": one, "several_clients": several, "ratio": several / one}


def throughput(client: Client, clients: int, *, with_image: bool) -> float:
    """Return tokens per second of all clients together, from the first request to the last byte."""
    # Questions of their own, so that no prompt was computed by an earlier repeat.
    questions = [f"{secrets.token_hex(4)}: what is this?" for _ in range(clients)]
    images = [new_image() if with_image else None for _ in questions]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(client.ask, questions, images))
    return tokens / (time.perf_counter() - start)


def measure_turns(client: Client, repeats: int) -> dict[str, Any]:
    """Return the seconds to the first token of each turn of conversations about new images, medians."""
    seconds: list[list[float]] = [[] for _ in QUESTIONS]
    for _ in range(repeats):
        messages: list[Any] = []
        for index, question in enumerate(QUESTIONS):
            messages.append(message(question, None if index else new_image()))
            pieces = list(client.stream(messages, TURN_TOKENS))
            seconds[index].append(pieces[0][0])
            messages.append({"role": "assistant", "content": "".join(text for _, text in pieces)})
    medians = [statistics.median(turn) for turn in seconds]
    return {"first_token_seconds": medians, "over_first_turn": [turn / medians[0] for turn in medians]}


def measure_shared_image(client: Client, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds to the first token of clients that ask about one image, one by one and at the same time."""

    def first_token(question: str, image: str) -> float:
        (seconds, _), *_ = client.stream([message(question, image)], TURN_TOKENS)
        return seconds

    first, second, last = [], [], []
    for _ in range(arguments.repeats):
        image = new_image()
        first.append(first_token(QUESTIONS[0], image))
        second.append(first_token(QUESTIONS[1], image))
        image = new_image()
        with ThreadPoolExecutor(arguments.clients) as pool:
            questions = [f"{number}: {QUESTIONS[0]}" for number in range(arguments.clients)]
            last.append(max(pool.map(first_token, questions, [image] * arguments.clients)))
    medians = [statistics.median(values) for values in (first, second, last)]
    return {
        "first_client_seconds": medians[0],
        "second_client_seconds": medians[1],
        "second_over_first": medians[1] / medians[0],
        "last_of_simultaneous_clients_seconds": medians[2],
    }


def measure_gaps(client: Client, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the longest gap between two pieces of a stream, alone and while others join with images, in seconds."""

    def longest_gap(num_joining: int) -> float:
        with ThreadPoolExecutor(max(num_joining, 1)) as pool:
            times, joining = [], []
            for index, (seconds, _) in enumerate(client.stream([message(QUESTIONS[3])], 4 * arguments.new_tokens)):
                times.append(seconds)
                if index == 8:
                    joining = [pool.submit(client.ask, QUESTIONS[0], new_image()) for _ in range(num_joining)]
            for one in joining:
                one.result()
        return max(after - before for before, after in pairwise(times))

    alone, joined = [], []
    for _ in range(arguments.repeats):
        alone.append(longest_gap(0))
        joined.append(longest_gap(arguments.clients - 1))
    return {"alone_seconds": statistics.median(alone), "others_join_seconds": statistics.median(joined)}


if __name__ == "__main__":
    main()
