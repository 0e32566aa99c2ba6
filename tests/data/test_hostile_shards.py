"""Tar shards that are damaged or hostile: the sample or the shard is reported by name, and the others are read."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.golden import GOLDEN
from support.training import write_shards

from yivl.data import tar_samples
from yivl.data.bad_rows import BadRows
from yivl.data.rows import Row, RowError
from yivl.data.streaming import open_shards, read_shards

PNG = (GOLDEN / "images/square_rgb.png").read_bytes()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(content))


def add_sample(tar: tarfile.TarFile, name: str) -> None:
    add(tar, f"{name}.png", PNG)
    add(tar, f"{name}.txt", name.encode())


def read(path: Path) -> tuple[list[str], list[str]]:
    """Return the captions and the errors of a shard."""
    rows = list(read_shards(open_shards([str(path)])))
    return (
        [str(row.turns[0].answer) for row in rows if isinstance(row, Row)],
        [str(row) for row in rows if isinstance(row, RowError)],
    )


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HOSTILE: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "symbolic link to nothing": (
        lambda tar: add(tar, "bad.png", type=tarfile.SYMTYPE, linkname="nowhere"),
        "bad.png is a link, a device or a sparse file",
    ),
    "hard link to nothing": (
        lambda tar: add(tar, "bad.png", type=tarfile.LNKTYPE, linkname="nowhere"),
        "bad.png is a link",
    ),
    "link to itself": (lambda tar: add(tar, "bad.png", type=tarfile.LNKTYPE, linkname="bad.png"), "bad.png is a link"),
    "FIFO": (lambda tar: add(tar, "bad.png", type=tarfile.FIFOTYPE), "bad.png is a link, a device"),
    "device": (lambda tar: add(tar, "bad.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "bad.png is a link"),
    "nested JSON": (lambda tar: add(tar, "bad.json", nested(100_000)), "json is nested too deeply"),
    "deeply nested conversation": (
        lambda tar: add(tar, "bad.json", b'{"conversations": ' + nested(100_000) + b"}"),
        "json is nested too deeply",
    ),
    "number that is too long": (lambda tar: add(tar, "bad.json", b'{"caption": ' + b"9" * 5000 + b"}"), "be read"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_costs_its_own_sample_only(kind: str, tmp_path: Path) -> None:
    write, message = HOSTILE[kind]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        add_sample(tar, "first")
        write(tar)
        add(tar, "bad.jpg", PNG)
        add_sample(tar, "../outside/last")  # nothing is extracted, so that a name is only a name
    captions, (error,) = read(tmp_path / "shard.tar")
    assert captions == ["first", "../outside/last"]
    assert error.startswith(f"{tmp_path / 'shard.tar'} sample bad: ")
    assert message in error


def test_names_that_are_not_text_are_reported_in_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a\nb\udcff.png", PNG)
    _, (error,) = read(tmp_path / "shard.tar")
    assert error.startswith(f"{tmp_path / 'shard.tar'} sample a\\nb\\udcff: no caption")
    BadRows("skip", tmp_path / "bad.jsonl")(RowError(error))
    assert "udcff" in (tmp_path / "bad.jsonl").read_text()


def test_a_member_of_many_bytes_is_not_read(tmp_path: Path) -> None:
    big = tarfile.TarInfo("huge.png")
    big.size = 10 * 2**30
    with (tmp_path / "shard.tar").open("wb") as file:
        file.write(_archive("first").rstrip(b"\0"))
        file.seek(-(-file.tell() // 512) * 512)
        file.write(big.tobuf())
        file.seek(big.size, os.SEEK_CUR)  # a sparse file
        file.write(_archive("last"))
    captions, (error,) = read(tmp_path / "shard.tar")
    assert captions == ["first", "last"]
    assert "sample huge: huge.png has 10,737,418,240 bytes; at most 268,435,455 are read" in error


def _archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add_sample(tar, name)
    return buffer.getvalue()


def test_headers_that_ask_for_memory_or_for_headers_without_end_are_damage(tmp_path: Path) -> None:
    for name, kind, size, count in (
        ("long name", tarfile.GNUTYPE_LONGNAME, 10 * 2**30, 1),
        ("extended header", tarfile.XHDTYPE, 10 * 2**30, 1),
        ("chain", tarfile.GNUTYPE_LONGNAME, 0, 5000),
    ):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, size
        path = tmp_path / f"{name}.tar"
        with path.open("wb") as file:
            for _ in range(count):
                file.write(header.tobuf())
            file.truncate(file.tell() + size)
        captions, errors = read(path)
        assert [error.partition(" (")[0] for error in errors] == [f"{path}: damaged shard"], name
        assert not captions


@pytest.mark.parametrize("seed", range(4))
def test_a_shard_with_flipped_bytes_never_ends_the_reader(seed: int, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 1, 5)
    path = tmp_path / "00000.tar"
    original, generator = path.read_bytes(), random.Random(seed)
    assert pattern
    for _ in range(60):
        content = bytearray(original)
        header = generator.randrange(10) * 1024  # a header, mostly
        for _ in range(generator.choice((1, 3, 20))):
            content[header + generator.randrange(512)] = generator.choice((0, 32, 48, 55, 128, 255))
        if generator.random() < 0.5:  # with a valid checksum, so that the other fields are used
            block = bytes(content[header : header + 512])
            total = sum(block[:148]) + 256 + sum(block[156:])
            content[header + 148 : header + 156] = b"%06o\0 " % total
        path.write_bytes(content[: generator.choice((len(content), generator.randrange(1, len(content))))])
        captions, errors = read(path)
        assert len(captions) + len(errors) <= 20


def test_a_shard_whose_middle_is_overwritten_is_damaged_and_not_shorter(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 6)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6]
    content = bytearray(path.read_bytes())
    content[third.offset : third.offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    captions, (error,) = read(path)
    assert captions == ["caption 0"]  # of the next, files may be missing
    assert f"damaged shard (invalid header at byte {third.offset})" in error


@pytest.mark.parametrize("member", [7, 8])
def test_a_shard_that_is_cut_at_a_header_is_damaged_and_not_shorter(member: int, tmp_path: Path) -> None:
    write_shards(tmp_path, 1, 6)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        place = tar.getmembers()[member].offset
    path.write_bytes(path.read_bytes()[:place])
    captions, (error,) = read(path)
    assert captions == ["caption 0", "caption 1"]
    assert "damaged shard (unexpected end of data)" in error


def test_a_missing_shard_and_one_that_is_no_file_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    for name, reason in (("fifo.tar", "not a regular file"), ("missing.tar", "No such file or directory")):
        captions, (error,) = read(tmp_path / name)
        assert not captions
        assert error.startswith(f"{tmp_path / name}: cannot be read (")
        assert reason in error
        assert error.endswith("its other samples are left out of this epoch")


def test_the_limit_of_a_member_is_the_largest_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_samples, "MAX_MEMBER_BYTES", 3000)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for size in (3000, 3001):
            add(tar, f"{size}.png", b"x" * size)
            add(tar, f"{size}.json", json.dumps({"caption": str(size)}).encode())
    captions, (error,) = read(tmp_path / "shard.tar")
    assert captions == ["3000"]
    assert "3001.png has 3,001 bytes; at most 3,000 are read" in error
