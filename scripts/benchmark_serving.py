"""Measure the tokens per second of the API with 1 client and with 8 clients, for a randomly initialized Yi-VL.

python scripts/benchmark_serving.py --shape medium --dtype bfloat16

Both are measured alternately in one run over HTTP; compare the ratio. Every answer has --new-tokens tokens: the
weights are changed so that no answer stops early.
"""

import argparse
import base64
import json
import secrets
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark_inference import GOLDEN, SHAPES, machine, rounded, write_random_checkpoint


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="medium", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()

    import torch
    import uvicorn

    from yivl.checkpoint.loading import load_model
    from yivl.serve.app import build_app
    from yivl.serve.limits import Limits
    from yivl.serve.scheduler import Scheduler

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(arguments.shape, arguments.dtype, folder)
        loaded = load_model(folder, device=arguments.device)
        with torch.no_grad():
            loaded.model.lm_head.weight[[294, 710, loaded.tokenizer.eos_token_id]] = 0
            loaded.model.lm_head.weight[len(loaded.tokenizer) :] = 0
        limits = Limits(max_batch=arguments.clients)
        server = uvicorn.Server(
            uvicorn.Config(build_app(Scheduler(loaded, limits), limits), port=0, log_config=None, access_log=False)
        )
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/chat/completions"
        results: dict[str, Any] = {
            "machine": machine(arguments.device),
            "shape": arguments.shape,
            "dtype": arguments.dtype,
            "new_tokens": arguments.new_tokens,
            "clients": arguments.clients,
            "text": measure(url, arguments, with_image=False),
            "image": measure(url, arguments, with_image=True),
        }
    print(json.dumps(rounded(results), indent=2))


def measure(url: str, arguments: argparse.Namespace, *, with_image: bool) -> dict[str, float]:
    """Return tokens per second of one client and of several, medians, and their ratio."""
    ask(url, "warm up", 4, with_image)
    alone, together = [], []
    for _ in range(arguments.repeats):
        alone.append(tokens_per_second(url, 1, arguments.new_tokens, with_image))
        together.append(tokens_per_second(url, arguments.clients, arguments.new_tokens, with_image))
    one, several = statistics.median(alone), statistics.median(together)
    return {"one_client": one, "several_clients": several, "ratio": several / one}


def tokens_per_second(url: str, clients: int, new_tokens: int, with_image: bool) -> float:
    """Return the rate of all clients together, from the first request to the last byte."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = list(pool.map(lambda number: ask(url, f"Question {number}?", new_tokens, with_image), range(clients)))
    return sum(tokens) / (time.perf_counter() - start)


def ask(url: str, question: str, new_tokens: int, with_image: bool) -> int:
    """Ask and return the number of generated tokens."""
    import httpx

    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if with_image:
        # Bytes after the end of a JPEG only change its digest, so that the server encodes every image.
        photo = (GOLDEN / "images/photo_rgb.jpg").read_bytes() + secrets.token_bytes(8)
        data = base64.b64encode(photo).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": new_tokens,
    }
    usage = httpx.post(url, json=body, timeout=600).raise_for_status().json()["usage"]
    assert usage["completion_tokens"] == new_tokens
    return new_tokens


if __name__ == "__main__":
    main()
