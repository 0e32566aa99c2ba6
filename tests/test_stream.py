"""Tar shards as a stream: nothing lost, nothing twice, and every batch in its place."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recipes import conversation, write_rows, write_shards

from yivl.data.bad_rows import BadRows
from yivl.data.examples import Encoder
from yivl.data.rows import Row, RowError
from yivl.data.sources import Source, read_sources
from yivl.data.stream import StreamDataset, parse_sample
from yivl.model.loading import LoadedModel


@pytest.fixture
def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048)


def captions(dataset: StreamDataset, slot: int, count: int) -> list[str]:
    rows = dataset._rows(slot)
    found = [next(rows) for _ in range(count)]
    assert all(isinstance(row, Row) for row in found)
    return [str(row.turns[0].answer) for row in found if isinstance(row, Row)]


@pytest.mark.parametrize(("shards", "world", "slots"), [(3, 1, 1), (4, 2, 2), (3, 2, 1), (2, 1, 3), (1, 2, 2)])
def test_an_epoch_over_all_processes_and_workers_holds_every_row_once(
    shards: int, world: int, slots: int, encoder: Encoder, tmp_path: Path
) -> None:
    per_shard = 4 * world * slots
    sources = read_sources(write_shards(tmp_path, shards, per_shard))
    per_stream = shards * per_shard // (world * slots)
    epochs: list[list[str]] = []
    for epoch in range(2):
        seen: Counter[str] = Counter()
        for rank in range(world):
            dataset = StreamDataset(
                sources, encoder, print, 2, rank=rank, world_size=world, num_slots=slots, shuffle_buffer=5
            )
            for slot in range(slots):
                seen.update(captions(dataset, slot, per_stream * 2)[epoch * per_stream : (epoch + 1) * per_stream])
        assert set(seen.values()) == {1}
        assert len(seen) == shards * per_shard
        epochs.append(list(seen))
    assert epochs[0] != epochs[1]  # another order


def test_a_batch_is_the_same_whoever_reads_it_and_whenever(encoder: Encoder, tmp_path: Path) -> None:
    def open_stream() -> StreamDataset:
        bad = BadRows("skip", tmp_path / "bad.jsonl")
        return StreamDataset(read_sources(pattern), encoder, bad, 2, num_slots=2, shuffle_buffer=4)

    def read(dataset: StreamDataset, batch: int) -> list[Any]:
        return [None if e is None else e.input_ids.tolist() for e in dataset.__getitems__([(batch, 0), (batch, 1)])]

    pattern = write_shards(tmp_path, 2, 6, bad=[3])
    stream = open_stream()
    in_order = [read(stream, batch) for batch in range(12)]
    assert sum(row is None for batch in in_order for row in batch) == 2  # the damaged picture, in both epochs
    for batch in (7, 10, 3):  # a run that resumes asks for a later one first
        assert read(open_stream(), batch) == in_order[batch]
    jumping = open_stream()
    assert [read(jumping, batch) for batch in (2, 4, 8)] == [in_order[2], in_order[4], in_order[8]]


def test_files_and_shards_mix_by_weight(encoder: Encoder, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", [conversation(None, "q", "of a file")])
    sources = [Source(write_shards(tmp_path, 1, 5), weight=3), Source(str(rows), weight=1)]
    dataset = StreamDataset(sources, encoder, print, 2)
    share = Counter(text == "of a file" for text in captions(dataset, 0, 400))[True] / 400
    assert 0.19 < share < 0.31


def test_more_streams_than_rows_is_an_error_that_says_what_to_change(encoder: Encoder, tmp_path: Path) -> None:
    sources = [Source(str(write_rows(tmp_path / "rows.json", [conversation(None, "q", "a")])))]
    dataset = StreamDataset(sources, encoder, print, 1, num_slots=4)
    with pytest.raises(RowError, match="too few rows for 4 streams"):
        next(dataset._rows(3))


def test_samples_are_captions_or_conversations() -> None:
    name = {"__key__": "0001", "__url__": "a.tar", "jpg": {"bytes": b"data", "path": None}}
    caption = parse_sample(name | {"txt": " a cat \n"})
    assert (caption.turns[0].question, caption.turns[0].answer, caption.images) == ("", "a cat", (b"data",))
    assert parse_sample(name | {"json": {"caption": "a dog"}}).turns[0].answer == "a dog"
    turns = conversation("x.png", "q", "a")["conversations"]
    assert parse_sample(name | {"json": {"conversations": turns}}).turns[0].question == "q"
    for wrong, message in (
        ({"jpg": None, "txt": "a cat"}, r"a\.tar sample 0001: no picture"),
        ({"txt": " "}, r"a\.tar sample 0001: no caption"),
        ({"json": {"conversations": turns[:1]}}, r"a\.tar sample 0001: the last question has no answer"),
    ):
        with pytest.raises(RowError, match=message):
            parse_sample(name | wrong)


def test_a_damaged_shard_is_an_error_that_names_it(encoder: Encoder, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 1, 6)
    path = tmp_path / "00000.tar"
    path.write_bytes(b"no tar")
    with pytest.raises(RowError, match=r"00000\.tar: not a tar shard"):
        next(StreamDataset(read_sources(pattern), encoder, print, 1)._rows(0))
    write_shards(tmp_path, 1, 60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 700])
    with pytest.raises(RowError, match="a damaged shard"):
        captions(StreamDataset(read_sources(pattern), encoder, print, 1), 0, 60)
