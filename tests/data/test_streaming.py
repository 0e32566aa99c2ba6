"""Streamed tar shards: every row once per epoch, and every batch the same for every reader."""

import errno
import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.golden import GOLDEN
from support.training import conversation, write_rows, write_shards

from yivl.checkpoint.loading import LoadedModel
from yivl.data.bad_rows import BadRows
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, RowError
from yivl.data.shards import select_samples
from yivl.data.sources import DataSource, read_sources
from yivl.data.streaming import StreamDataset, open_shards, read_shards


@pytest.fixture
def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048)


def captions(dataset: StreamDataset, slot: int, count: int) -> list[str]:
    rows = dataset._rows(slot)
    found = [next(rows) for _ in range(count)]
    assert all(isinstance(row, Row) for row in found)
    return [str(row.turns[0].answer) for row in found if isinstance(row, Row)]


@pytest.mark.parametrize(
    ("shards", "world", "slots"), [(3, 1, 1), (4, 2, 2), (3, 2, 1), (7, 2, 2), (2, 1, 3), (1, 2, 2)]
)
def test_an_epoch_over_all_ranks_and_workers_has_every_row_once(
    shards: int, world: int, slots: int, encoder: Encoder, tmp_path: Path
) -> None:
    (source,) = read_sources(write_shards(tmp_path, shards, 5))
    epochs: list[list[str]] = []
    for epoch in range(2):
        seen: list[str] = []
        for rank in range(world):
            dataset = StreamDataset([source], encoder, print, 2, rank, world, slots, shuffle_buffer=5)
            for slot in range(slots):
                rows = dataset._tar_rows(source, epoch, rank * slots + slot, world * slots)
                seen += [str(row.turns[0].answer) for row in rows if isinstance(row, Row)]
        assert sorted(seen) == sorted(f"caption {number}" for number in range(shards * 5))
        epochs.append(seen)
    assert epochs[0] != epochs[1]  # another order


def test_a_rank_opens_only_its_own_shards(encoder: Encoder, tmp_path: Path) -> None:
    (source,) = read_sources(write_shards(tmp_path, 10, 2))
    opened: list[set[str]] = []
    for part in range(4):
        rows = [*StreamDataset([source], encoder, print, 1)._tar_rows(source, 0, part, 4)]
        opened.append({row.origin.split(" sample")[0] for row in rows if isinstance(row, Row)})
    assert [len(paths) for paths in opened] == [3, 3, 2, 2]
    assert len(set.union(*opened)) == 10


@pytest.mark.parametrize(("shards", "world", "slots"), [(6, 1, 1), (6, 2, 2), (2, 2, 2), (1, 1, 3)])
def test_limited_shards_have_the_same_subset_in_every_epoch_for_any_ranks_and_workers(
    shards: int, world: int, slots: int, encoder: Encoder, tmp_path: Path
) -> None:
    source = DataSource(write_shards(tmp_path, shards, 9), max_rows=7)
    everywhere: set[tuple[str, ...]] = set()
    for epoch in range(2):
        seen: list[str] = []
        for part in range(world * slots):
            rows = StreamDataset([source], encoder, print, 1)._tar_rows(source, epoch, part, world * slots)
            seen += [str(row.turns[0].answer) for row in rows if isinstance(row, Row)]
        assert len(set(seen)) == len(seen) == 7
        everywhere.add(tuple(sorted(seen)))
    assert len(everywhere) == 1
    alone = StreamDataset([source], encoder, print, 1)._tar_rows(source, 0, 0, 1)
    assert everywhere == {tuple(sorted(str(row.turns[0].answer) for row in alone if isinstance(row, Row)))}
    assert (
        StreamDataset([source], encoder, print, 1, seed=1).subsets != StreamDataset([source], encoder, print, 1).subsets
    )


def test_a_limited_stream_resumes_exactly_and_reads_no_image_that_is_left_out(encoder: Encoder, tmp_path: Path) -> None:
    source = DataSource(write_shards(tmp_path, 3, 6), max_rows=8)

    def open_stream() -> StreamDataset:
        return StreamDataset([source], encoder, pytest.fail, 2, num_slots=2, shuffle_buffer=4)

    def read(dataset: StreamDataset, batch: int) -> list[Any]:
        return [sample and sample.input_ids.tolist() for sample in dataset.__getitems__([batch, batch])]

    stream = open_stream()
    in_order = [read(stream, batch) for batch in range(10)]
    assert len({str(ids) for batch in in_order for ids in batch}) == 8
    for batch in (5, 8, 3):
        assert read(open_stream(), batch) == in_order[batch]


def test_a_damaged_shard_under_a_limit_is_still_reported(encoder: Encoder, tmp_path: Path) -> None:
    source = DataSource(write_shards(tmp_path, 2, 6), max_rows=3)
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    rows = [*StreamDataset([source], encoder, print, 1)._tar_rows(source, 0, 0, 1)]
    (error,) = (str(row) for row in rows if isinstance(row, RowError))
    assert "00000.tar: damaged shard (" in error
    assert len(rows) == 4


def test_a_read_error_while_samples_are_counted_is_an_error_and_not_a_damaged_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = DataSource(write_shards(tmp_path, 2, 6), max_rows=3)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tarfile, "open", fail)
    with pytest.raises(RowError, match=r"00000\.tar: cannot be read \(Input/output error\)"):
        select_samples(source, 0)


def test_a_batch_is_the_same_for_every_reader_at_any_time(encoder: Encoder, tmp_path: Path) -> None:
    def open_stream() -> StreamDataset:
        bad = BadRows("skip", tmp_path / "bad.jsonl")
        return StreamDataset(read_sources(pattern), encoder, bad, 2, num_slots=2, shuffle_buffer=4)

    def read(dataset: StreamDataset, batch: int) -> list[Any]:
        return [None if e is None else e.input_ids.tolist() for e in dataset.__getitems__([batch, batch])]

    pattern = write_shards(tmp_path, 2, 6, bad=[3])
    stream = open_stream()
    in_order = [read(stream, batch) for batch in range(12)]
    assert sum(row is None for batch in in_order for row in batch) == 2  # the damaged image, in both epochs
    for batch in (7, 10, 3):  # a resumed run starts with a later batch
        assert read(open_stream(), batch) == in_order[batch]
    jumping = open_stream()
    assert [read(jumping, batch) for batch in (2, 4, 8)] == [in_order[2], in_order[4], in_order[8]]


def test_files_and_shards_mix_by_weight(encoder: Encoder, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", [conversation(None, "q", "of a file")])
    sources = [DataSource(write_shards(tmp_path, 1, 5), weight=3), DataSource(str(rows), weight=1)]
    dataset = StreamDataset(sources, encoder, print, 2)
    share = Counter(text == "of a file" for text in captions(dataset, 0, 400))[True] / 400
    assert 0.19 < share < 0.31


def test_more_streams_than_rows_is_an_error_with_the_flag_to_change(encoder: Encoder, tmp_path: Path) -> None:
    sources = [DataSource(str(write_rows(tmp_path / "rows.json", [conversation(None, "q", "a")])))]
    dataset = StreamDataset(sources, encoder, print, 1, num_slots=4)
    with pytest.raises(RowError, match="too few rows for 4 streams"):
        next(dataset._rows(3))


PNG = (GOLDEN / "images/square_rgb.png").read_bytes()
CONVERSATION = json.dumps(conversation("x.png", "q", "a")).encode()


def shard_of(path: Path, samples: Sequence[Mapping[str, bytes]]) -> str:
    """Write samples that may differ in their files."""
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"folder/{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(path)


def test_one_shard_may_mix_kinds_of_samples_and_an_invalid_one_affects_no_other(tmp_path: Path) -> None:
    good = [
        {"jpg": PNG, "txt": b" a cat \n"},
        {"png": PNG, "json": json.dumps({"caption": "a dog"}).encode()},
        {"webp": PNG, "json": CONVERSATION},
        {"JPG": PNG, "txt": "一只猫".encode(), "json": b'{"width": "three"}'},
    ]
    bad = [
        ({"txt": b"no image"}, "no image"),
        ({"jpg": PNG, "txt": b" "}, "no caption"),
        ({"jpg": PNG, "txt": b"\xff\xfe"}, "cannot be read"),
        ({"jpg": PNG, "json": b"{"}, "cannot be read"),
        ({"jpg": PNG, "json": b"[1]"}, "json is not an object"),
        ({"jpg": PNG, "json": b'{"conversations": [{"from": "human", "value": "q"}]}'}, "has no answer"),
    ]
    path = shard_of(tmp_path / "mixed.tar", [*good, *(files for files, _ in bad), *good])
    rows = list(read_shards(open_shards([path])))
    parsed = [(row.turns[0].question, row.turns[0].answer) for row in rows if isinstance(row, Row)]
    assert parsed == [("", "a cat"), ("", "a dog"), ("q", "a"), ("", "一只猫")] * 2
    assert all(row.images == (PNG,) for row in rows if isinstance(row, Row))
    errors = [str(row) for row in rows if isinstance(row, RowError)]
    for number, (error, (_, reason)) in enumerate(zip(errors, bad, strict=True), len(good)):
        assert error.startswith(f"{path} sample folder/{number:04d}: ")
        assert reason in error


@pytest.mark.parametrize("damage", ["no tar", "cut"])
def test_a_damaged_shard_is_reported_and_the_others_are_read(damage: str, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 2, 6)
    path = tmp_path / "00000.tar"
    path.write_bytes(b"no tar" if damage == "no tar" else path.read_bytes()[: path.stat().st_size // 2 + 700])
    rows = list(read_shards(open_shards(DataSource(pattern).shards())))
    (error,) = (str(row) for row in rows if isinstance(row, RowError))
    assert error.startswith(f"{path}: damaged shard (")
    captions_read = {row.turns[0].answer for row in rows if isinstance(row, Row)}
    assert captions_read >= {f"caption {number}" for number in range(6, 12)}
    assert len(captions_read) < 12
