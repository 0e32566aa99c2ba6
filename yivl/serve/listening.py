"""The port of a server, and the server process of the API."""

import asyncio
import errno
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

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
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
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


class Connection(H11Protocol):
    """A connection that is cut off if its client sends no whole headers, or does not receive the answer, in time.

    uvicorn waits for both without a limit, and the body of a request is held until its answer is sent.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds_to_send = limits.max_receive_seconds
        self._seconds_to_answer = limits.max_receive_seconds + limits.max_seconds + _LAST_EVENTS_SECONDS
        self._answered: Any = None  # the request whose answer is awaited; None while the headers of one are
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._restart_timer(self._seconds_to_send)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        answered = None if self.cycle is None or self.cycle.response_complete else self.cycle
        if answered is not self._answered:
            self._answered = answered
            self._restart_timer(self._seconds_to_send if answered is None else self._seconds_to_answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _restart_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # Not close(), which waits until a client has received what is buffered.
        self._timer = self.loop.call_later(seconds, self.transport.abort)


class Server(uvicorn.Server):
    """A server whose answers end properly when it is stopped.

    Answers have ``shutdown_seconds`` to finish. Those that have not then end with an error that says so, instead of a
    connection that is cut off.
    """

    def __init__(self, app: Any, scheduler: "Scheduler", limits: Limits) -> None:
        seconds = limits.shutdown_seconds + _LAST_EVENTS_SECONDS
        options: dict[str, Any] = {"access_log": False, "log_config": None, "server_header": False}
        options["http"] = partial(Connection, limits=limits)
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
