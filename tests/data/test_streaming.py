"""Streamed tar shards: every row once per epoch, and streams that continue exactly where a checkpoint was."""

import errno
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from support.golden import GOLDEN
from support.training import conversation, write_rows, write_shards

from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import YI_VL
from yivl.data import shard_facts, shard_file, shards
from yivl.data.bad_rows import BadRows
from yivl.data.collator import Collator
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, RowError
from yivl.data.shard_facts import fingerprint, select_samples
from yivl.data.shard_file import ShardFile
from yivl.data.sources import DataSource, read_sources
from yivl.data.stream_position import DataPosition, Layout, read_position
from yivl.data.streaming import Stream, StreamBatch, StreamCollator, StreamDataset, open_shards, read_shards
from yivl.errors import CheckpointError


@pytest.fixture
def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048, YI_VL)


def streams_of(
    sources: Sequence[DataSource], encoder: Encoder, parts: int = 1, *, start: DataPosition | None = None, **fields: Any
) -> list[Stream]:
    """Return the streams of all ranks and workers, at their start or where a checkpoint was."""
    dataset = StreamDataset(sources, encoder, pytest.fail, 1, num_slots=parts, **{"shuffle_buffer": 4} | fields)
    if start is not None:
        dataset.start = start.resume(parts)
    return [dataset.open_stream(part) for part in range(parts)]


def answer(row: Row | RowError) -> str:
    return str(row) if isinstance(row, RowError) else str(row.turns[0].answer)


def rest(stream: Stream, epoch: int, source: int = 0) -> list[tuple[int, str]]:
    """Return epoch and answer of each row that a stream of one source reads until the end of an epoch."""
    found = []
    while True:
        row = answer(next(stream))
        now = stream.position.sources[source].epoch
        if now > epoch:
            return found
        found.append((now, row))


def saved(streams: Sequence[Stream], start: DataPosition, folder: Path) -> DataPosition:
    """Return the positions of streams after they were written to a checkpoint and read again."""
    DataPosition(start.layout, [stream.position for stream in streams]).write(folder)
    return read_position(folder, start.layout.shards, start.layout.seed)


@pytest.mark.parametrize(("shards", "parts"), [(3, 1), (4, 4), (3, 2), (7, 4), (2, 3), (1, 4)])
def test_an_epoch_over_all_ranks_and_workers_has_every_row_once(
    shards: int, parts: int, encoder: Encoder, tmp_path: Path
) -> None:
    sources = read_sources(write_shards(tmp_path, shards, 5))
    rows = [row for stream in streams_of(sources, encoder, parts) for row in rest(stream, 1)]
    for epoch in range(2):
        assert sorted(text for number, text in rows if number == epoch) == sorted(
            f"caption {number}" for number in range(shards * 5)
        )
    assert [text for number, text in rows if number == 0] != [text for number, text in rows if number == 1]


def test_a_rank_opens_only_its_own_shards(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr(shards, "ShardFile", lambda path: opened.append(path) or ShardFile(path))
    numbers = []
    for stream in streams_of(read_sources(write_shards(tmp_path, 10, 2)), encoder, 4):
        before = len(opened)
        # Not until the end of the epoch, where the next one begins.
        for _ in range(4):
            next(stream)
        numbers.append(len(opened) - before)
    assert numbers == [3, 3, 2, 2]
    assert len(set(opened)) == 10


@pytest.mark.parametrize(("shards", "parts"), [(6, 1), (6, 4), (2, 4), (1, 3)])
def test_limited_shards_have_the_same_subset_in_every_epoch_for_any_ranks_and_workers(
    shards: int, parts: int, encoder: Encoder, tmp_path: Path
) -> None:
    sources = [DataSource(write_shards(tmp_path, shards, 9), max_rows=7)]
    rows = [row for stream in streams_of(sources, encoder, parts) for row in rest(stream, 1)]
    alone = {text for _, text in rest(*streams_of(sources, encoder), 0)}
    assert len(alone) == 7
    for epoch in range(2):
        assert sorted(text for number, text in rows if number == epoch) == sorted(alone)
    assert alone != {text for _, text in rest(*streams_of(sources, encoder, seed=1), 0)}


def test_a_damaged_shard_under_a_limit_is_still_reported(encoder: Encoder, tmp_path: Path) -> None:
    source = DataSource(write_shards(tmp_path, 2, 6), max_rows=3)
    (tmp_path / "00000.tar").write_bytes(b"no tar")
    rows = [text for _, text in rest(*streams_of([source], encoder), 0)]
    (error,) = (text for text in rows if "caption" not in text)
    assert "00000.tar: damaged shard (" in error
    assert len(rows) == 4


def test_a_read_error_while_samples_are_counted_is_an_error_and_not_a_damaged_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = DataSource(write_shards(tmp_path, 2, 6), max_rows=3)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shard_file, "_open", fail)
    monkeypatch.setattr(shard_facts, "ShardFile", partial(ShardFile, pauses=()))
    with pytest.raises(RowError, match=r"00000\.tar: cannot be read at byte 0, tried 1 times \(.*Input/output error\)"):
        select_samples(source, 0)


def test_samples_are_counted_once_for_all_ranks_and_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = DataSource(write_shards(tmp_path, 2, 6), max_rows=3)
    subset = select_samples(source, 0)
    counted: list[ShardFile] = []
    original = shard_facts.count_samples
    monkeypatch.setattr(shard_facts, "count_samples", lambda file: counted.append(file) or original(file))
    assert select_samples(source, 0) == subset
    assert not counted
    write_shards(tmp_path, 1, 7)  # the content of the first shard changes
    assert select_samples(source, 0).num_samples == 13
    assert len(counted) == 2
    (tmp_path / "a file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "a file")
    assert select_samples(source, 0).num_samples == 13
    assert "a file/yivl-shards: the numbers of samples are not cached (" in caplog.text


def test_the_fingerprint_changes_with_the_shards_and_not_with_their_folder(tmp_path: Path) -> None:
    def of_folder(name: str) -> str:
        return fingerprint(DataSource(str(tmp_path / name / "*.tar")))

    for name in ("one", "two"):
        write_shards(tmp_path / name, 2, 6)
    before = of_folder("one")
    assert of_folder("two") == before
    path = tmp_path / "two/00001.tar"
    content = path.read_bytes()
    for changed in (content[:600] + b"x" + content[601:], content[:-10300] + b"x" + content[-10299:], content + b"\0"):
        path.write_bytes(changed)
        assert of_folder("two") != before
    path.write_bytes(content)
    assert of_folder("two") == before
    path.rename(tmp_path / "two/00002.tar")
    assert of_folder("two") != before


def kinds_of_sources(folder: Path) -> dict[str, list[DataSource]]:
    few, many = write_shards(folder / "few", 2, 9, bad=[3]), write_shards(folder / "many", 7, 4)
    rows = write_rows(folder / "rows.json", [conversation(None, "q", f"row {number}") for number in range(19)])
    return {
        "few shards": [DataSource(few)],
        "many shards": [DataSource(many)],
        "limited": [DataSource(many, max_rows=17)],
        "files": [DataSource(str(rows))],
        "mixture": [DataSource(few, weight=2), DataSource(str(rows)), DataSource(many, max_rows=17)],
    }


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["few shards", "many shards", "limited", "files", "mixture"])
def test_streams_continue_after_any_row_as_if_they_had_not_been_interrupted(
    kind: str, parts: int, encoder: Encoder, tmp_path: Path
) -> None:
    sources = kinds_of_sources(tmp_path)[kind]
    start = StreamDataset(sources, encoder, pytest.fail, 1, num_slots=parts).start
    whole = [[answer(next(stream)) for _ in range(60)] for stream in streams_of(sources, encoder, parts)]
    assert len({tuple(rows) for rows in whole}) == parts
    for stop in (0, 1, 5, 13, 18, 19, 40):
        streams = streams_of(sources, encoder, parts)
        for part, stream in enumerate(streams):
            for _ in range(stop + part):
                next(stream)
        resumed = streams_of(sources, encoder, parts, start=saved(streams, start, tmp_path))
        for part, stream in enumerate(resumed):
            assert [answer(next(stream)) for _ in range(10)] == whole[part][stop + part : stop + part + 10]


@pytest.mark.parametrize("kind", ["few shards", "many shards", "limited", "files"])
def test_other_numbers_of_streams_read_exactly_what_is_left_of_each_epoch(
    kind: str, encoder: Encoder, tmp_path: Path
) -> None:
    sources = kinds_of_sources(tmp_path)[kind]
    every_row = Counter(text for _, text in rest(*streams_of(sources, encoder), 0))
    generator = random.Random(kind)
    for before, between, after in product((1, 2, 4), (1, 3, 5), (1, 2)):
        start = StreamDataset(sources, encoder, pytest.fail, 1, num_slots=before).start
        read: Counter[str] = Counter()
        for parts in (before, between):  # a run that was interrupted twice
            streams = streams_of(sources, encoder, parts, start=start)
            for stream in streams:
                read.update(answer(next(stream)) for _ in range(generator.randrange(14 // parts)))
            start = saved(streams, start.resume(parts), tmp_path)
        begun = [position.sources[0].epoch for position in start.positions]
        last = max(begun + [epoch for epochs in start.layout.rests for epoch in epochs])
        streams = streams_of(sources, encoder, after, start=start)
        read.update(text for stream in streams for _, text in rest(stream, last))
        assert read == Counter({text: (last + 1) * number for text, number in every_row.items()})


def test_resuming_reads_only_the_shuffle_buffer_again(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = read_sources(write_shards(tmp_path, 2, 60))
    read: list[int] = []
    original = ShardFile.read

    def count(file: ShardFile, size: int) -> bytes:
        read.append(size)
        return original(file, size)

    monkeypatch.setattr(ShardFile, "read", count)
    start = StreamDataset(sources, encoder, pytest.fail, 1).start
    numbers = []
    for rows in (10, 50, 100):
        streams = streams_of(sources, encoder)
        for _ in range(rows):
            next(streams[0])
        position = saved(streams, start, tmp_path)
        read.clear()
        next(*streams_of(sources, encoder, start=position))
        numbers.append(sum(read))
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert max(numbers) < whole / 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "data_position.json is missing, so that the place in the tar shards is unknown"),
        ("{", "damaged .*resume from an earlier checkpoint"),
        ("[" * 100_000, "damaged .*RecursionError"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1, "generation": 0, "shards": [2], "rests": [], "streams": []}', "do not fit"),
        (
            '{"version": 1, "generation": 0, "shards": [2], "rests": [], "streams": [{"rows": 0, "sources": [7]}]}',
            "Type",
        ),
        ("of other shards", r"the sources had \[3\] tar shards when it was written, and have \[2\] now"),
    ],
)
def test_a_position_that_cannot_be_used_is_an_error(damage: str | None, message: str, tmp_path: Path) -> None:
    if damage == "of other shards":
        layout = Layout([[0, 1, 2]], 1)
        DataPosition(layout, [layout.start()]).write(tmp_path)
    elif damage is not None:
        (tmp_path / "data_position.json").write_text(damage)
    with pytest.raises(CheckpointError, match=message):
        read_position(tmp_path, [[0, 1]], 0)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_changed_source_starts_with_a_new_epoch_and_the_others_continue(
    parts: int, encoder: Encoder, tmp_path: Path
) -> None:
    """The sources change to other numbers of shards and rows, so that no former place can exist."""
    kept = DataSource(write_shards(tmp_path / "kept", 2, 8))
    before = [DataSource(write_shards(tmp_path / "before", 5, 6)), kept, DataSource(rows_of(tmp_path / "a.json", 19))]
    now = [DataSource(write_shards(tmp_path / "now", 2, 7)), kept, DataSource(rows_of(tmp_path / "b.json", 4))]
    dataset = StreamDataset(before, encoder, pytest.fail, 1, num_slots=2, shuffle_buffer=4)
    streams = [dataset.open_stream(part) for part in range(2)]
    for stream in streams:
        for _ in range(25):
            next(stream)
    epochs = [max(stream.position.sources[source].epoch for stream in streams) for source in range(3)]
    DataPosition(dataset.start.layout, [stream.position for stream in streams]).write(tmp_path)
    new = StreamDataset(now, encoder, pytest.fail, 1, num_slots=parts, shuffle_buffer=4)
    with pytest.raises(CheckpointError, match="the sources had"):
        read_position(tmp_path, new.shard_numbers, 0)
    found = read_position(tmp_path, new.shard_numbers, 0, changed=[0, 2])
    resumed = [replace(place, rows=0) for place in found.positions]
    expected = [replace(stream.position, rows=0) for stream in streams]
    assert [place.sources[1] for place in resumed] == [place.sources[1] for place in expected]
    for source, total in ((0, 14), (2, 4)):
        counts: Counter[str] = Counter()
        for stream in streams_of(now, encoder, parts, start=found):
            own = stream._sources[source]
            while (row := own.next_row()) and own.position.epoch == epochs[source] + 1:
                counts[answer(row)] += 1
        assert len(counts) == counts.total() == total


def rows_of(path: Path, number: int) -> str:
    return str(write_rows(path, [conversation(None, "q", f"{path.name} {index}") for index in range(number)]))


def test_batches_carry_the_position_after_their_last_sample(encoder: Encoder, tmp_path: Path) -> None:
    sources = read_sources(write_shards(tmp_path, 2, 6, bad=[3]))
    bad = BadRows("skip", tmp_path / "bad.jsonl")

    def dataset() -> StreamDataset:
        return StreamDataset(sources, encoder, bad, 2, num_slots=2, shuffle_buffer=4)

    def ids(batch: StreamBatch) -> list[Any]:
        return [sample and sample.input_ids.tolist() for sample in batch.samples]

    whole = dataset()
    batches = [whole.__getitems__([number] * 2) for number in range(12)]
    assert [batch.part for batch in batches] == [0, 1] * 6
    assert sum(sample is None for batch in batches for sample in batch.samples) == 2  # the damaged image, twice
    for number in (2, 5, 9):
        resumed = dataset()
        resumed.start = replace(
            resumed.start, positions=[b.position for b in sorted(batches[number - 2 : number], key=attrgetter("part"))]
        )
        assert [ids(resumed.__getitems__([n] * 2)) for n in range(number, 12)] == [ids(b) for b in batches[number:]]
    collated = StreamCollator(Collator(0))(batches[0])
    assert collated.pop("position") == replace(batches[0], samples=())
    assert collated.keys() == Collator(0)(batches[0].samples).keys()


def test_files_and_shards_mix_by_weight(encoder: Encoder, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", [conversation(None, "q", "of a file")])
    sources = [DataSource(write_shards(tmp_path, 1, 5), weight=3), DataSource(str(rows), weight=1)]
    (stream,) = streams_of(sources, encoder)
    share = Counter(answer(next(stream)) for _ in range(400))["of a file"] / 400
    assert 0.19 < share < 0.31


def test_more_streams_than_rows_is_an_error_with_the_flag_to_change(encoder: Encoder, tmp_path: Path) -> None:
    sources = [DataSource(str(write_rows(tmp_path / "rows.json", [conversation(None, "q", "a")])))]
    with pytest.raises(RowError, match="too few rows for 4 streams"):
        next(streams_of(sources, encoder, 4)[3])


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
