"""Tar shards as they come, for data of LAION's scale: nothing is listed, counted or unpacked beforehand."""

import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Example
from yivl.data.rows import Row, RowError, parse_row
from yivl.data.sampler import encode_or_none
from yivl.data.sources import Source, load_rows

_PICTURES = ("jpg", "jpeg", "png", "webp")
Key = tuple[int, int]
"""Number of the batch, and place in it."""


@dataclass(frozen=True)
class StreamSampler(Sampler[list[Key]]):
    """Numbers the batches of one process, for as long as training lasts."""

    batch_size: int
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in range(self.num_batches):
            yield [(batch, place) for place in range(self.batch_size)]


@dataclass
class StreamDataset(Dataset[Example | None]):
    """Endless rows of tar shards and files, drawn by weight; batch ``n`` is always the same, whoever reads it.

    The rows of a process are dealt to ``num_slots`` streams (one for each data-loading worker), and batch ``n`` takes
    the next ``batch_size`` rows of stream ``n % num_slots``. So the place in the data follows from the number of the
    batch alone: a resumed run passes over raw bytes, decodes no picture, and goes on exactly where the other stopped,
    as long as the numbers of processes, workers and rows in a batch stay the same.

    In every epoch of a source each of its rows is read exactly once by one stream of one process.
    """

    sources: Sequence[Source]
    encoder: Encoder
    on_bad_row: Callable[[RowError], None]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_slots: int = 1
    seed: int = 0
    shuffle_buffer: int = 1000
    """Rows of a stream that are shuffled at a time; the order of the shards is shuffled too."""
    _streams: dict[int, tuple[int, Iterator[Row | RowError]]] = field(default_factory=dict, repr=False)

    def __getitems__(self, keys: Sequence[Key]) -> list[Example | None]:
        """Return the examples of a batch (the name by which PyTorch asks for many at a time)."""
        slot, turn = keys[0][0] % self.num_slots, keys[0][0] // self.num_slots
        next_turn, rows = self._streams.get(slot, (-1, iter(())))
        if next_turn != turn:
            rows = islice(self._rows(slot), turn * self.batch_size, None)
        self._streams[slot] = (turn + 1, rows)
        return [self._example(row) for row in islice(rows, len(keys))]

    def _example(self, row: Row | RowError) -> Example | None:
        if isinstance(row, RowError):
            self.on_bad_row(row)
            return None
        return encode_or_none(row, self.encoder, self.on_bad_row)

    def _rows(self, slot: int) -> Iterator[Row | RowError]:
        """Yield the endless rows of one stream; a row that cannot be parsed is its error."""
        part, parts = self.rank * self.num_slots + slot, self.world_size * self.num_slots
        streams = [self._endless(source, part, parts) for source in self.sources]
        weights = [source.weight for source in self.sources]
        generator = random.Random(f"{self.seed} {part}")
        while True:
            yield next(generator.choices(streams, weights)[0])

    def _endless(self, source: Source, part: int, parts: int) -> Iterator[Row | RowError]:
        epoch = 0
        while True:
            rows = self._tar_rows if source.is_stream else self._file_rows
            empty = True
            for row in rows(source, epoch, part, parts):
                empty = False
                yield row
            if empty:
                raise RowError(
                    f"{source.data_path}: too few rows for {parts} streams (processes times --dataloader_num_workers)"
                )
            epoch += 1

    def _file_rows(self, source: Source, epoch: int, part: int, parts: int) -> Iterator[Row | RowError]:
        bad: list[RowError] = []
        rows: list[Row | RowError] = [*load_rows(source, self.seed, bad.append), *bad]
        random.Random(f"{self.seed} {epoch}").shuffle(rows)
        yield from rows[part::parts]

    def _tar_rows(self, source: Source, epoch: int, part: int, parts: int) -> Iterator[Row | RowError]:
        shards = source.shards()
        if len(shards) >= parts:
            stream = open_shards(shards[part::parts])
        else:  # every part reads all of them and keeps its share of the rows
            stream = split_dataset_by_node(open_shards(shards), rank=part, world_size=parts)
        stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        stream.set_epoch(epoch)
        yield from read_shards(stream)


def open_shards(paths: Sequence[str]) -> Any:
    """Return the samples of tar shards as a streaming data set of ``datasets``, every file as bytes."""
    return datasets.IterableDataset.from_generator(_read_samples, gen_kwargs={"paths": list(paths)})


def read_shards(stream: Any) -> Iterator[Row | RowError]:
    """Yield the rows of a stream; a row that cannot be used is its error."""
    # Not plain iteration: that would split the samples once more over data-loading workers.
    for batch in stream.iter(batch_size=1):
        sample = {key: value[0] for key, value in batch.items()}
        try:
            yield parse_sample(sample)
        except RowError as error:
            yield error


def _read_samples(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of shards: the files of one name, by their suffix.

    Not by the reader of ``datasets``: that expects in every sample what it found in the first five, and one caption
    that is not UTF-8 would end the run. What is lost at the end of a damaged shard is a sample without files.
    """
    for path in paths:
        files: dict[str, bytes] = {}
        name = ""
        try:
            with tarfile.open(path) as tar:
                for entry in tar:
                    stem, _, suffix = os.path.basename(entry.name).partition(".")
                    stem = os.path.join(os.path.dirname(entry.name), stem)
                    if files and stem != name:
                        yield {"origin": f"{path} sample {name}", "files": files, "error": ""}
                        files = {}
                    content = tar.extractfile(entry)  # None for folders and links
                    if content is not None:
                        name, files = stem, files | {suffix.lower(): content.read()}
        except (OSError, tarfile.TarError) as error:
            yield {"origin": path, "files": {}, "error": f"a damaged shard ({error}); download it again"}
            continue
        if files:
            yield {"origin": f"{path} sample {name}", "files": files, "error": ""}


def parse_sample(sample: Mapping[str, Any]) -> Row:
    """Return the row of one sample of a tar shard: a picture, and a caption or a conversation.

    The picture is ``jpg``, ``jpeg``, ``png`` or ``webp``; the caption ``txt``, or ``caption`` or ``text`` in ``json``.
    A ``json`` with ``conversations`` is a row of the published form.

    Raises:
        RowError: If there is no picture or no text, or the conversation is not as it should be.
    """
    origin, files = sample["origin"], sample["files"]
    if sample["error"]:
        raise RowError(f"{origin}: {sample['error']}")
    picture = next((files[kind] for kind in _PICTURES if files.get(kind)), None)
    if picture is None:
        raise RowError(f"{origin}: no picture; expected one of {', '.join(_PICTURES)}")
    try:
        text = files.get("txt", b"").decode("utf-8")
        fields = json.loads(files.get("json") or b"{}")
    except ValueError as error:  # both of bad UTF-8 and of bad JSON
        raise RowError(f"{origin}: caption or json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise RowError(f"{origin}: json is no object")
    if "conversations" in fields:
        return parse_row({"conversations": fields["conversations"]}, origin, images=[picture])
    text = text.strip() or fields.get("caption") or fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{origin}: no caption; expected txt, or caption in json")
    return parse_row({"text": text}, origin, images=[picture])
