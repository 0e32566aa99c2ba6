"""The port of a server, and the server process of the API."""

import asyncio
import errno
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from yivl.errors import YiVLError
from yivl.serve.limits import Limits

if TYPE_CHECKING:
    from yivl.serve.scheduler import Scheduler

_LAST_EVENTS_SECONDS: Final = 5  # for the errors of answers that were cut off to reach their clients


def bind(host: str, port: int, flags: str) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of a host, before the model is loaded, which takes longer to fail.

    Args:
        host: Name or address to listen on.
        port: Port; 0 chooses a free one, the same for all addresses.
        flags: The flags that named the address, for the error.

    Raises:
        YiVLError: If an address cannot be listened on.

    Source of the options: ``loop.create_server`` of Python's asyncio.
    """
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            chosen = listeners[0].getsockname()[1] if listeners else port
            try:
                listeners.append(_bound(family, kind, protocol, (address[0], chosen, *address[2:])))
            except OSError as error:
                # Names such as localhost keep their IPv6 address on systems without IPv6.
                if family != socket.AF_INET6 or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                unavailable = error
        if not listeners:
            raise unavailable
    except (OSError, OverflowError) as error:
        for listener in listeners:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise YiVLError(f"{flags}: {host}:{port} cannot be listened on ({reason}); choose another") from error
    return listeners


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting connections.

        Raises:
            YiVLError: If another server has begun to listen on the port since it was bound: ``SO_REUSEADDR`` lets
                several servers bind a port as long as none listens. None listens while the model is loaded, so that
                clients are refused instead of waiting.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            reason = error.strerror or error
            raise YiVLError(f"--port: cannot be listened on ({reason}); choose another") from error

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests, and wait for the running ones."""
        close = threading.Thread(target=self._scheduler.close, name="close")
        timer = asyncio.get_running_loop().call_later(self._seconds, close.start)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
