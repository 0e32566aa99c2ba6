"""Streamed tar shards for data of LAION's size: nothing is unpacked, or counted without a limit, beforehand."""

import json
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Sample, encode_or_skip
from yivl.data.rows import Row, RowError, parse_row
from yivl.data.shards import ShardSubset, iterate_samples, select_samples
from yivl.data.sources import DataSource, load_rows

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class StreamSampler(Sampler[list[int]]):
    """The numbers of the batches of one rank, once for each of their samples."""

    batch_size: int
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return ([batch] * self.batch_size for batch in range(self.num_batches))


@dataclass
class StreamDataset(Dataset[Sample | None]):
    """An endless mixture of tar shards and files, in which batch ``n`` is the same for every reader.

    A rank has ``num_slots`` streams, one for each data-loading worker; batch ``n`` is the next ``batch_size`` rows of
    stream ``n % num_slots``. The number of a batch thus determines its place in the data: a resumed run skips raw
    bytes, decodes no image, and continues exactly, as long as ranks, workers and samples per batch keep their numbers.

    In each epoch of a source, exactly one stream of one rank reads a row. Of tar shards with ``max_rows``, only the
    samples that ``select_samples`` returns are read, the same in every epoch.
    """

    sources: Sequence[DataSource]
    encoder: Encoder
    on_bad_row: Callable[[RowError], None]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_slots: int = 1
    seed: int = 0
    shuffle_buffer: int = 1000
    """Rows in the shuffle buffer of a stream; the order of the shards is shuffled too."""
    subsets: Mapping[DataSource, ShardSubset] = field(init=False, repr=False)
    """Of every source of tar shards with ``max_rows``; computed once, before data-loading workers start."""
    _streams: dict[int, tuple[int, Iterator[Row | RowError]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        limited = [source for source in self.sources if source.is_streamed and source.max_rows is not None]
        self.subsets = {source: select_samples(source, self.seed) for source in limited}

    def __getitems__(self, batch: Sequence[int]) -> list[Sample | None]:
        """Return the samples of a batch of ``StreamSampler`` (PyTorch prefers this method to ``__getitem__``)."""
        turn, slot = divmod(batch[0], self.num_slots)
        next_turn, rows = self._streams.get(slot, (-1, iter(())))
        if next_turn != turn:
            rows = islice(self._rows(slot), turn * self.batch_size, None)
        self._streams[slot] = (turn + 1, rows)
        return [encode_or_skip(row, self.encoder, self.on_bad_row) for row in islice(rows, len(batch))]

    def _rows(self, slot: int) -> Iterator[Row | RowError]:
        """Yield the endless rows of one stream, sampled by weight; an invalid row is its error."""
        part, parts = self.rank * self.num_slots + slot, self.world_size * self.num_slots
        streams = [self._epochs(source, part, parts) for source in self.sources]
        weights = [source.weight for source in self.sources]
        generator = random.Random(f"{self.seed} {part}")
        while True:
            yield next(generator.choices(streams, weights)[0])

    def _epochs(self, source: DataSource, part: int, parts: int) -> Iterator[Row | RowError]:
        read = self._tar_rows if source.is_streamed else self._file_rows
        for epoch in count():
            row = None
            for row in read(source, epoch, part, parts):
                yield row
            if row is None:
                raise RowError(f"{source.name}: too few rows for {parts} streams (ranks x --dataloader_num_workers)")

    def _file_rows(self, source: DataSource, epoch: int, part: int, parts: int) -> Iterator[Row | RowError]:
        bad: list[RowError] = []
        rows: list[Row | RowError] = [*load_rows(source, self.seed, bad.append), *bad]
        random.Random(f"{self.seed} {epoch}").shuffle(rows)
        rows = rows[part::parts]  # the other streams' rows leave memory
        yield from rows

    def _tar_rows(self, source: DataSource, epoch: int, part: int, parts: int) -> Iterator[Row | RowError]:
        subset = self.subsets.get(source)
        shards, kept = (source.shards(), None) if subset is None else (list(subset.kept), subset.kept)
        if len(shards) >= parts:
            stream = open_shards(shards[part::parts], kept)
        else:  # every stream reads all shards and keeps its part of the rows
            stream = split_dataset_by_node(open_shards(shards, kept), rank=part, world_size=parts)
        stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        stream.set_epoch(epoch)
        yield from read_shards(stream)


def open_shards(paths: Sequence[str], kept: Mapping[str, Sequence[int]] | None = None) -> Any:
    """Return the raw samples of tar shards, or those of the indices in ``kept``, as a ``datasets.IterableDataset``."""
    kwargs = {"paths": list(paths), "kept": None if kept is None else {path: kept[path] for path in paths}}
    return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs=kwargs)


def read_shards(stream: Any) -> Iterator[Row | RowError]:
    """Yield the rows of a dataset of ``open_shards``; an invalid row is its error."""
    # Not plain iteration: that would split the shards over the data-loading workers again.
    for batch in stream.iter(batch_size=1):
        try:
            yield parse_shard_sample({key: value[0] for key, value in batch.items()})
        except RowError as error:
            yield error


def _read_shards(paths: Sequence[str], kept: Mapping[str, Sequence[int]] | None) -> Iterator[dict[str, Any]]:
    """Yield the raw samples of tar shards, or those of the indices in ``kept``.

    The webdataset reader of ``datasets`` is not used: it expects the suffixes of the first five samples in all others,
    and one caption that is not UTF-8 ends the run. The end of a damaged shard is yielded as an error.
    """
    for path in paths:
        indices = None if kept is None else set(kept[path])
        try:
            with tarfile.open(path) as tar:
                for index, (name, entries) in enumerate(iterate_samples(tar)):
                    if indices is None or index in indices:
                        files = {suffix: file.read() for suffix, e in entries.items() if (file := tar.extractfile(e))}
                        yield {"origin": f"{path} sample {name}", "files": files, "error": ""}
        except (OSError, tarfile.TarError) as error:
            yield {"origin": path, "files": {}, "error": f"damaged shard ({error}); download it again"}


def parse_shard_sample(sample: Mapping[str, Any]) -> Row:
    """Return the row of one sample of a tar shard: an image, and a caption or a conversation.

    The image is ``jpg``, ``jpeg``, ``png`` or ``webp``; the caption is ``txt``, or ``caption`` or ``text`` in ``json``.
    A ``json`` with ``conversations`` or ``messages`` is a row as ``parse_row`` documents it.

    Raises:
        RowError: If there is no image or no text, or the conversation is invalid.
    """
    origin, files = sample["origin"], sample["files"]
    if sample["error"]:
        raise RowError(f"{origin}: {sample['error']}")
    image = next((files[suffix] for suffix in _IMAGE_SUFFIXES if files.get(suffix)), None)
    if image is None:
        raise RowError(f"{origin}: no image; expected one of {', '.join(_IMAGE_SUFFIXES)}")
    try:
        text = files.get("txt", b"").decode("utf-8")
        fields = json.loads(files.get("json") or b"{}")
    except ValueError as error:  # invalid UTF-8 and invalid JSON
        raise RowError(f"{origin}: txt or json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise RowError(f"{origin}: json is not an object")
    if fields.keys() & {"conversations", "messages"}:
        return parse_row(fields, origin, images=[image])
    text = text.strip() or fields.get("caption") or fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{origin}: no caption; expected txt, or caption in json")
    return parse_row({"text": text}, origin, images=[image])
