"""The port of a server, and the server process of the API."""

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from yivl.errors import YiVLError
from yivl.serve.limits import Limits

if TYPE_CHECKING:
    from yivl.serve.scheduler import Scheduler

_LAST_EVENTS_SECONDS: Final = 5  # for the errors of answers that were cut off to reach their clients


def bind(host: str, port: int, flags: str) -> socket.socket:
    """Return a socket that is bound to an address, before the model is loaded, which takes longer to fail.

    Args:
        host: Name or address to listen on.
        port: Port; 0 chooses a free one.
        flags: The flags that named the address, for the error.

    Raises:
        YiVLError: If the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise YiVLError(f"{flags}: {host}:{port} cannot be listened on ({reason}); choose another") from error
    return listener


class Server(uvicorn.Server):
    """A server whose answers end properly when it is stopped.

    Answers have ``shutdown_seconds`` to finish. Those that have not then end with an error that says so, instead of a
    connection that is cut off.
    """

    def __init__(self, app: Any, scheduler: "Scheduler", limits: Limits) -> None:
        seconds = limits.shutdown_seconds + _LAST_EVENTS_SECONDS
        options: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=seconds, **options))
        self._scheduler = scheduler
        self._seconds = limits.shutdown_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests, and wait for the running ones."""
        close = threading.Thread(target=self._scheduler.close, name="close")
        timer = asyncio.get_running_loop().call_later(self._seconds, close.start)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
