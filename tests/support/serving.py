"""Chat requests, and programs that listen on a port."""

import base64
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def data_url(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}] if urls else text}


def free_port() -> int:
    """Return a port that nothing listens on.

    It is below the range from which Linux takes ports for connections, so that none of those takes it before its user
    listens, and random, whatever seed a test has set, so that tests that run at the same time get others.
    """
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_until(state: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a state; the limit only ends a test that would never reach it."""
    ticks = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if state():
            return
        ticks.wait(0.02)
    raise AssertionError("the state was never reached")
