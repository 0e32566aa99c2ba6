"""Chat requests, and programs that listen on a port."""

import base64
import socket
import threading
from collections.abc import Callable
from typing import Any


def data_url(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}] if urls else text}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(state: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a state; the limit only ends a test that would never reach it."""
    ticks = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if state():
            return
        ticks.wait(0.02)
    raise AssertionError("the state was never reached")
