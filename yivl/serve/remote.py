"""Images from http(s) addresses, fetched without exposing the server's network to clients (SSRF).

The host must be listed, all its addresses must be public, the connection uses the address that was checked, and every
redirect is checked again.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from yivl.errors import ImageError

_MAX_REDIRECTS: Final = 3
_PORTS: Final = {"http": 80, "https": 443}
_LOCAL: Final = ("::/96", "64:ff9b:1::/48")  # IPv4-compatible addresses, and local-use NAT64
_REDIRECTS: Final = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Return whether an IP address is public, including addresses that embed an IPv4 address."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if embedded:
            return is_public(str(embedded))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.is_site_local or any(ip in ipaddress.ip_network(block) for block in _LOCAL):
            return False
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from a list of hosts.

    Args:
        hosts: Allowed names, with ``:port`` unless it is the default of the scheme; an empty list allows none.
        max_bytes: Of an image.
        max_seconds: Of a fetch, redirects included.
        is_allowed: Whether an IP address may be connected to.
    """

    hosts: Collection[str]
    max_bytes: int
    max_seconds: float = 20.0
    is_allowed: Callable[[str], bool] = is_public

    def fetch(self, address: str) -> bytes:
        """Return the bytes at an http(s) address.

        Raises:
            ImageError: If it is not allowed or cannot be fetched; the message does not reveal what the address serves.
        """
        deadline = time.monotonic() + self.max_seconds
        for _ in range(_MAX_REDIRECTS + 1):
            parts = self._checked(address)
            try:
                status, location, data = self._get(parts, deadline)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ImageError("the image at this address cannot be fetched") from error
            if status == 200:
                return data
            if status not in _REDIRECTS or not location:
                break
            address = urljoin(address, location)
        raise ImageError("the image at this address cannot be fetched")

    def _checked(self, address: str) -> SplitResult:
        """Return the parts of an address whose scheme and host are allowed."""
        # Characters that URL parsers treat differently are refused before parsing.
        if not address.isascii() or not address.isprintable() or set(address) & set(" \\"):
            raise ImageError("the address of an image may hold only ASCII, and no spaces or backslashes")
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError as error:
            raise ImageError("the address of an image is not valid") from error
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
            raise ImageError("the address of an image must begin with http:// or https:// and name a host, no user")
        name = parts.hostname if port in (None, _PORTS[parts.scheme]) else f"{parts.hostname}:{port}"
        if name not in {allowed.lower() for allowed in self.hosts}:
            raise ImageError("images may not be fetched from this host")
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> tuple[int, str | None, bytes]:
        """Return status, redirect location and body, over a connection to a checked address."""
        assert parts.hostname
        port = parts.port or _PORTS[parts.scheme]
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        if not addresses or not all(self.is_allowed(address) for address in addresses):
            raise ValueError("not a public address")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, port)
        # A host that sends its headers byte by byte would restart the timeout of the socket each time.
        timer = threading.Timer(_left(deadline), lambda: _shut(connection.sock))
        timer.start()
        try:
            stream = connection.sock = socket.create_connection((addresses[0], port), timeout=_left(deadline))
            if parts.scheme == "https":
                context = ssl.create_default_context()
                stream = connection.sock = context.wrap_socket(stream, server_hostname=parts.hostname)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "yivl"})
            response = connection.getresponse()
            data = bytearray()
            while response.status == 200 and (block := response.read1(2**16)):
                data += block
                if len(data) > self.max_bytes:
                    raise ValueError("too large")
                stream.settimeout(_left(deadline))
            return response.status, response.getheader("Location"), bytes(data)
        finally:
            timer.cancel()
            connection.close()


def _shut(stream: socket.socket | None) -> None:
    """End a connection from another thread; a blocked read returns."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    """Return the remaining seconds.

    Raises:
        TimeoutError: If none remain.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("out of time")
    return seconds
