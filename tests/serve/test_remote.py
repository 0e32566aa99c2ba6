"""Addresses of images: what a client may make the server reach for."""

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from yivl.errors import ImageError
from yivl.serve.remote import Fetcher, is_public

MEGABYTE = 2**20


class _Host(http.server.BaseHTTPRequestHandler):
    """A host with an image, and with ways to go wrong."""

    asked: list[str] = []  # noqa: RUF012 (of one test; the fixture empties it)

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['Host']}{self.path}")
        name, _, target = self.path.lstrip("/").partition("?")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(b"x" * MEGABYTE)
        elif name == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                time.sleep(0.1)
                self.wfile.write(b"x")
        elif name == "image":
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"bytes")
        else:
            self.send_error(404, "secret words")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    server.daemon_threads = True
    _Host.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def local(host: str, **options: Any) -> Fetcher:
    """A fetcher to whom this machine is the internet."""
    return Fetcher([host], MEGABYTE, is_allowed=lambda address: address in ("127.0.0.1", "::1"), **options)


@pytest.fixture(autouse=True)
def _no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host listens at 127.0.0.1 only; ``localhost`` may also mean ::1."""
    resolve = socket.getaddrinfo

    def resolve_ipv4(name: str, port: int, family: int = 0, *rest: Any, **options: Any) -> Any:
        return resolve(name, port, socket.AF_INET, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_ipv4)


def test_an_image_of_a_listed_host_is_fetched(host: str) -> None:
    assert local(host).fetch(f"http://{host}/image") == b"bytes"
    assert local(host).fetch(f"HTTP://LOCALHOST:{host.split(':')[1]}/to?/image") == b"bytes"
    assert _Host.asked[0] == f"{host}/image"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2001:0:1::80ff:fffe", "fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/image",
        "http://{host}.other.example/image",
        "http://localhost/image",  # another port
        "ftp://{host}/image",
        "file:///etc/passwd",
        "http:///image",
        "http://user@{host}/image",
        "http://other.example@{host}/image",
        "http://{host}\\@other.example/image",
        "http://other.example\\@{host}/image",
        "http://{host}/a b",
        "http://{host}/a\nb",
        "http://{host}/a\tb",
        "http://ⓛocalhost/image",
        "http://localhost:99999/image",
        "http://[::1/image",
    ],
)
def test_other_addresses_are_refused_before_anything_is_asked(url: str, host: str) -> None:
    with pytest.raises(ImageError):
        local(host).fetch(url.format(host=host))
    assert _Host.asked == []


def test_a_listed_name_that_points_inside_is_refused(host: str) -> None:
    with pytest.raises(ImageError, match="cannot be fetched"):
        Fetcher([host], MEGABYTE).fetch(f"http://{host}/image")
    assert _Host.asked == []


def test_a_name_of_which_one_address_points_inside_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("127.0.0.1", 80))]
    )
    with pytest.raises(ImageError, match="cannot be fetched"):
        Fetcher(["somewhere.example"], MEGABYTE).fetch("http://somewhere.example/image")


def test_a_name_is_resolved_once_and_that_address_is_used(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that changes its mind between check and connection changes nothing."""
    port, asked = int(host.split(":")[1]), []
    connected = []

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        return [(0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(
        socket,
        "create_connection",
        lambda where, **options: connected.append(where) or _connect(where, options["timeout"]),
    )
    fetcher = Fetcher([f"name.example:{port}"], MEGABYTE, is_allowed=lambda _: True)
    assert fetcher.fetch(f"http://name.example:{port}/image") == b"bytes"
    assert asked == ["name.example"]
    assert connected == [("127.0.0.1", port)]
    assert _Host.asked == [f"name.example:{port}/image"]


def _connect(where: tuple[str, int], timeout: float) -> socket.socket:
    stream = socket.socket()
    stream.settimeout(timeout)
    stream.connect(where)
    return stream


@pytest.mark.parametrize(
    "target", ["http://other.example/image", "file:///etc/passwd", "//other.example/", "/to?/to?/to?/to?/image"]
)
def test_redirects_are_looked_at_anew_and_counted(target: str, host: str) -> None:
    with pytest.raises(ImageError):
        local(host).fetch(f"http://{host}/to?{target}")
    assert len(_Host.asked) <= 4


def test_size_and_time_have_limits_and_errors_say_nothing(host: str) -> None:
    said = set()
    for name in ("endless", "slow", "nothing"):
        begun = time.monotonic()
        with pytest.raises(ImageError) as caught:
            local(host, max_seconds=1.0).fetch(f"http://{host}/{name}")
        assert time.monotonic() - begun < 5
        said.add(str(caught.value))
    assert said == {"the image at this address cannot be fetched"}


def test_https_asks_for_a_certificate_of_the_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def wrap(self: ssl.SSLContext, stream: socket.socket, server_hostname: str) -> socket.socket:
        names.append((server_hostname, self.check_hostname, self.verify_mode))
        return stream

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    assert local(host).fetch(f"https://{host}/image") == b"bytes"
    assert names == [("localhost", True, ssl.CERT_REQUIRED)]
