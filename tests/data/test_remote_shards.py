"""Tar shards behind http: retried, resumed in the middle, skipped and reported; nothing is read without the flag."""

import http.server
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.training import losses, train, write_shards
from torch.utils.data import DataLoader

from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import YI_VL
from yivl.data import shard_file
from yivl.data.bad_rows import BadRows
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, RowError
from yivl.data.shard_facts import fingerprint
from yivl.data.shard_file import ShardFile
from yivl.data.sources import DataSource, read_sources
from yivl.data.stream_position import DataPosition
from yivl.data.streaming import Stream, StreamDataset
from yivl.errors import YiVLError


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder; ``broken`` says how many requests of a file fail, and how."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.broken: dict[str, tuple[str, int]] = {}
        self.has_ranges = True
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.respond(is_head=True)

    def do_GET(self) -> None:
        self.respond(is_head=False)

    def respond(self, *, is_head: bool) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        way, count = self.server.broken.get(name, ("", 0))
        if count:
            self.server.broken[name] = way, count - 1
            if way.isdecimal():
                self.send_error(int(way))
                return
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        begin, end = (int(match[1]), int(match[2]) + 1) if match and self.server.has_ranges else (0, len(content))
        body = content[begin:end]
        self.send_response(206 if match and self.server.has_ranges else 200)
        if match and self.server.has_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if is_head:
            return
        if count and way == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.server.bytes_sent += len(body)
        with suppress(ConnectionError):  # the client may have read enough
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(shard_file, "RETRY_PAUSES", (0.0, 0.0, 0.0))
    with Server(tmp_path) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048, YI_VL)


def stream_of(
    server: Server, encoder: Encoder, start: DataPosition | None = None, name: str = "{00..02}.tar"
) -> Stream:
    sources = read_sources(server.url(f"000{name}"), allow_remote_data=True)
    dataset = StreamDataset(sources, encoder, pytest.fail, 1, shuffle_buffer=4)
    if start is not None:
        dataset.start = start
    return dataset.open_stream(0)


def texts(stream: Stream, count: int) -> list[str]:
    rows = [next(stream) for _ in range(count)]
    return [str(row.turns[0].answer) if isinstance(row, Row) else f"error {row}" for row in rows]


CAPTIONS = [f"caption {number}" for number in range(21)]


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(("way", "count"), [("", 0), ("503", 2), ("429", 2), ("cut", 2)])
def test_shards_behind_http_have_the_samples_of_the_files(
    has_ranges: bool, way: str, count: int, server: Server, encoder: Encoder, tmp_path: Path
) -> None:
    write_shards(tmp_path, 3)
    server.has_ranges, server.broken["00001.tar"] = has_ranges, (way, count)
    stream = stream_of(server, encoder)
    assert sorted(texts(stream, 21)) == sorted(CAPTIONS)
    assert server.broken["00001.tar"] == (way, 0)  # it did fail


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_stream_behind_http_continues_exactly(
    has_ranges: bool, server: Server, encoder: Encoder, tmp_path: Path
) -> None:
    write_shards(tmp_path, 3)
    server.has_ranges = has_ranges
    whole = texts(stream_of(server, encoder), 30)
    for stop in (3, 11, 20):
        stream = stream_of(server, encoder)
        texts(stream, stop)
        start = DataPosition(stream._sources[0]._layout, [stream.position])
        assert texts(stream_of(server, encoder, start), 10) == whole[stop : stop + 10]


def test_a_file_continues_at_an_offset_with_a_range_request(server: Server, tmp_path: Path) -> None:
    content = os.urandom(12 * 2**20)  # more than the 5 MB that fsspec asks for at once
    (tmp_path / "a.tar").write_bytes(content)
    for has_ranges in (True, False):
        server.has_ranges, server.bytes_sent = has_ranges, 0
        file = ShardFile(server.url("a.tar"))
        for offset in (11 * 2**20, 6 * 2**20, 100):
            file.seek(offset)
            assert file.read(1000) == content[offset : offset + 1000]
        assert file.tell() == 1100
        file.close()
        if has_ranges:
            assert server.bytes_sent < len(content)


@pytest.mark.parametrize(
    ("way", "requests", "reason"),
    [("404", 2, "404"), ("403", 2, "403"), ("503", 8, "tried 4 times (503"), ("cut", 8, "tried 4 times (")],
)
def test_a_shard_that_cannot_be_read_is_skipped_and_reported(
    way: str, requests: int, reason: str, server: Server, encoder: Encoder, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write_shards(tmp_path, 3)
    (tmp_path / "00002.tar").write_bytes(b"no tar")
    server.broken["00001.tar"] = way, 1000
    found = texts(stream_of(server, encoder), 9)
    errors = sorted(text for text in found if text.startswith("error"))
    assert sorted(text for text in found if not text.startswith("error")) == sorted(CAPTIONS[:7])
    assert len(errors) == 2
    assert errors[0].startswith(f"error {server.url('00001.tar')}: cannot be read")
    assert reason in errors[0]
    assert "damaged" not in errors[0]
    assert errors[1].startswith(f"error {server.url('00002.tar')}: damaged shard (")
    assert "of 3 shards: " in caplog.text
    assert "1 damaged" in caplog.text
    assert "1 could not be read" in caplog.text
    assert server.requests["00001.tar"] == requests  # permanent errors are not retried


def test_a_shard_that_fails_while_the_buffer_is_read_again_is_reported_once(
    server: Server, encoder: Encoder, tmp_path: Path
) -> None:
    write_shards(tmp_path, 1, 20)
    stream = stream_of(server, encoder, name="00.tar")
    texts(stream, 5)
    start = DataPosition(stream._sources[0]._layout, [stream.position])
    (tmp_path / "00000.tar").rename(tmp_path / "away.tar")
    resumed = stream_of(server, encoder, start, name="00.tar")
    assert texts(resumed, 1)[0].startswith(f"error {server.url('00000.tar')}: cannot be read")
    (tmp_path / "away.tar").rename(tmp_path / "00000.tar")
    assert len(set(texts(resumed, 8)) & {f"caption {number}" for number in range(20)}) == 8


def test_data_loading_workers_read_shards_behind_http(server: Server, encoder: Encoder, tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    (source,) = sources = read_sources(server.url("{00000..00002}.tar"), allow_remote_data=True)
    fingerprint(source)  # starts the event loop of fsspec in this process, which a fork does not have
    dataset: Any = StreamDataset(sources, encoder, pytest.fail, 1, num_slots=2, shuffle_buffer=2)
    batches = [[number] for number in range(10)]
    found = [*DataLoader(dataset, batch_sampler=batches, num_workers=2, collate_fn=list_of_ids)]  # type: ignore[arg-type]
    assert len(found) == len(set(found)) == 10


def list_of_ids(batch: Any) -> str:
    return str([sample.input_ids.tolist() for sample in batch.samples])


def test_a_run_reads_urls_with_the_flag_and_skips_a_missing_shard(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, 2)
    url = server.url("{00000..00002}.tar")
    stream: dict[str, Any] = {"max_steps": 2, "shuffle_buffer": 4}
    with pytest.raises(YiVLError, match=r"http://.*\.tar: a URL; add --allow_remote_data to read"):
        train(tmp_path / "out", url, **stream)
    assert not server.requests
    with pytest.raises(RowError, match=r"00002\.tar: cannot be read \(.*404.*fix the row, or skip invalid rows"):
        train(tmp_path / "error", url, **stream | {"max_steps": 12}, allow_remote_data=True)
    log = train(tmp_path / "skip", url, **stream | {"max_steps": 12}, allow_remote_data=True, on_bad_row="skip")
    assert len(losses(log)) == 12
    assert "1 invalid rows were skipped" in BadRows("skip", tmp_path / "skip/bad_rows.jsonl").report()


def test_fingerprints_of_urls_change_with_the_shards(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    (source,) = read_sources(server.url("{00000..00001}.tar"), allow_remote_data=True)
    before = fingerprint(source)
    assert fingerprint(source) == before
    os.utime(tmp_path / "00001.tar", ns=(1, 1))
    changed = fingerprint(source)
    assert changed not in (before, None)
    (tmp_path / "00001.tar").unlink()
    assert fingerprint(source) not in (before, changed, None)


def test_an_error_of_the_network_is_not_taken_for_other_content(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, 2)
    (source,) = read_sources(server.url("{00000..00001}.tar"), allow_remote_data=True)
    expected = fingerprint(source)
    server.broken["00001.tar"] = ("503", 2)
    assert fingerprint(source) == expected  # after new tries
    server.broken["00001.tar"] = ("503", 100)
    caplog.clear()
    assert fingerprint(source) is None
    assert "is not compared with that of other runs" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://a/{000..100}.tar", r"https://a/\{000\.\.100\}\.tar: a URL; add --allow_remote_data"),
        ("s3://bucket/*.tar", r"s3://bucket/\*\.tar: a URL; add --allow_remote_data"),
    ],
)
def test_urls_need_a_flag(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(f"- {{data_path: '{path}'}}\n")
    for data in (path, str(tmp_path / "mix.yaml")):
        with pytest.raises(YiVLError, match=message):
            read_sources(data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/{000..100}.tar", "s3://.*: needs a package that is not installed; pip install s3fs"),
        ("gs://bucket/0.tar", "pip install gcsfs"),
        ("unknown://bucket/0.tar", "fsspec has no driver for unknown://"),
        ("https://a/*.tar", r"a URL cannot have \*; number the shards as in \{00000\.\.00099\}\.tar"),
        ("https://a/rows.json", "only tar shards are read from URLs"),
        ("https://a/mix.yaml", "only tar shards are read from URLs"),
    ],
)
def test_urls_that_cannot_be_read_are_errors_with_what_to_do(path: str, message: str) -> None:
    with pytest.raises(YiVLError, match=message):
        read_sources(path, allow_remote_data=True)


def test_a_limit_does_not_download_all_shards() -> None:
    with pytest.raises(RowError, match="max_rows needs the headers of all shards"):
        read_sources("https://a/0.tar", max_rows=5, allow_remote_data=True)


def test_local_read_errors_are_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    original, failures = shard_file._open, iter([OSError(5, "Input/output error")] * 2)

    def fail(path: str, is_whole: bool) -> Any:
        for error in failures:
            raise error
        return original(path, is_whole)

    monkeypatch.setattr(shard_file, "_open", fail)
    file = ShardFile(str(tmp_path / "a.tar"), pauses=(0.0, 0.0))
    file.seek(3)
    with caplog.at_level(logging.WARNING):
        assert file.read(4) == b"3456"
    assert caplog.text.count("read at byte 3 failed ([Errno 5] Input/output error); trying again in 0 s") == 2


def test_names_of_sources_keep_urls_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("- {name: web, data_path: ['https://a/{0..2}.tar', 'https://b/0.tar']}\n")
    (source,) = read_sources(str(tmp_path / "mix.yaml"), allow_remote_data=True)
    assert source.shards() == [*(f"https://a/{number}.tar" for number in range(3)), "https://b/0.tar"]
    with pytest.raises(RowError, match=r"names https://a/0\.tar twice"):
        DataSource(("https://a/0.tar", "https://a/{0..1}.tar")).shards()
