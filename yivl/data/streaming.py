"""Streamed tar shards for data of LAION's size: nothing is unpacked, or counted without a limit, beforehand."""

import json
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Sample, encode_or_skip
from yivl.data.orders import shuffled
from yivl.data.rows import Row, RowError, parse_row
from yivl.data.shard_facts import ShardSubset, select_samples
from yivl.data.shards import ShardReader
from yivl.data.sources import DataSource, load_rows
from yivl.data.stream_position import DataPosition, Layout, Piece, SourcePosition, StreamPosition
from yivl.data.tar_samples import TarSample

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


@dataclass(frozen=True)
class StreamBatch:
    """The samples of one batch, and where their stream is after them."""

    samples: Sequence[Sample | None]
    part: int
    """Index of the stream over all ranks."""
    position: StreamPosition


@dataclass(frozen=True)
class StreamCollator:
    """Collates streamed samples; ``position`` of the batch is its ``StreamBatch`` without samples."""

    collate: Callable[[Sequence[Sample | None]], dict[str, Any]]

    def __call__(self, batch: StreamBatch) -> dict[str, Any]:
        """Return the batch of ``collate`` and ``position``."""
        return self.collate(batch.samples) | {"position": replace(batch, samples=())}


@dataclass
class StreamDataset(Dataset[Sample | None]):
    """An endless mixture of tar shards and files.

    A rank has ``num_slots`` streams, one for each data-loading worker; batch ``n`` is the next batch of stream
    ``n % num_slots``. A stream starts at its position in ``start``, in a time that does not depend on what was read
    before, and its order is determined by the seed.

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
    shards: Sequence[Sequence[str]] = field(init=False, repr=False)
    """Paths of the tar shards of every source; none for files."""
    start: DataPosition = field(init=False, repr=False)
    """Of the streams of all ranks; set before data-loading workers start."""
    _streams: dict[int, "Stream"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        limited = [source for source in self.sources if source.is_streamed and source.max_rows is not None]
        self.subsets = {source: select_samples(source, self.seed) for source in limited}
        self.shards = [source.shards() if source.is_streamed else [] for source in self.sources]
        parts = self.world_size * self.num_slots
        layout = Layout(self.shard_numbers, parts, self.seed)
        self.start = DataPosition(layout, [layout.start()] * parts)

    @property
    def shard_numbers(self) -> list[list[int]]:
        """Of every source, the indices of the shards that are read; files of rows count as one."""
        indices = []
        for source, paths in zip(self.sources, self.shards, strict=True):
            if source in self.subsets:
                kept = self.subsets[source].kept
                indices.append([number for number, path in enumerate(paths) if path in kept])
            else:
                indices.append(list(range(max(len(paths), 1))))
        return indices

    def __getitems__(self, batch: Sequence[int]) -> StreamBatch:
        """Return a batch of ``StreamSampler`` (PyTorch prefers this method to ``__getitem__``).

        The batches of a stream are read in their order, whatever their numbers.
        """
        part = self.rank * self.num_slots + batch[0] % self.num_slots
        if part not in self._streams:
            self._streams[part] = self.open_stream(part)
        stream = self._streams[part]
        samples = [encode_or_skip(next(stream), self.encoder, self.on_bad_row) for _ in batch]
        return StreamBatch(samples, part, stream.position)

    def open_stream(self, part: int) -> "Stream":
        """Return stream ``part`` at its start."""
        layout, position = self.start.layout, self.start.positions[part]
        streams = []
        for number, (source, place) in enumerate(zip(self.sources, position.sources, strict=True)):
            read: _Read
            if source.is_streamed:
                subset = self.subsets.get(source)
                reader = ShardReader(self.shards[number], None if subset is None else subset.kept)
                read, size = reader.read, self.shuffle_buffer
            else:
                # The order of an epoch is shuffled as a whole.
                read, size = _RowReader(source, self.seed).read, 1
            streams.append(_SourceStream(source.name, layout, number, part, place, read, size))
        return Stream(streams, [source.weight for source in self.sources], layout, part, position.rows)


class Stream(Iterator[Row | RowError]):
    """The endless rows of one stream, of sources that are sampled by weight; an invalid row is its error."""

    def __init__(
        self, sources: Sequence["_SourceStream"], weights: Sequence[float], layout: Layout, part: int, rows: int
    ) -> None:
        self._sources, self._weights, self._rows = sources, weights, rows
        self._key = f"{layout.seed} {layout.generation} {part}"

    @property
    def position(self) -> StreamPosition:
        """The place after the last row."""
        return StreamPosition(self._rows, tuple(source.position for source in self._sources))

    def __next__(self) -> Row | RowError:
        # A generator for each row: its state is the number of the row, and not 2.5 kB.
        (source,) = random.Random(f"{self._key} {self._rows}").choices(self._sources, self._weights)
        row = source.next_row()
        self._rows += 1
        return row


@dataclass(frozen=True)
class _FileRow:
    """A row of files; its index is its place in the order of the epoch."""

    index: int
    row: Row | RowError
    offset: int = 0

    @property
    def end(self) -> int:
        return 0


_Read = Callable[[int, Piece], Iterator[TarSample | _FileRow | RowError]]


class _SourceStream:
    """The endless rows of one source in one stream, through a shuffle buffer."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        number: int,
        part: int,
        position: SourcePosition,
        read: _Read,
        buffer_size: int,
    ) -> None:
        self._name, self._layout, self._number, self._part = name, layout, number, part
        self._read, self._buffer_size = read, buffer_size
        self._epoch, self._place, self._drawn = position.epoch, position.place, position.drawn
        self._offset, self._index = position.offset, position.index
        self._pieces = layout.pieces(number, self._epoch, part)
        self._entries: Iterator[TarSample | _FileRow | RowError] | None = None
        self._errors: list[RowError] = []
        self._buffer = self._read_buffer(position.buffer)

    def _read_buffer(self, numbers: Sequence[int]) -> list[tuple[int, TarSample | _FileRow]]:
        """Return the samples of the shuffle buffer, which are read again in the order of the shards."""
        references = [*zip(*(iter(numbers),) * 3, strict=True)]
        found: dict[tuple[int, ...], TarSample | _FileRow] = {}
        for reference in sorted(references):
            for entry in self._read(self._epoch, Piece(*reference, 0, 0)):
                if isinstance(entry, RowError):
                    self._errors.append(entry)
                else:
                    found[reference] = entry
        return [(reference[0], found[reference]) for reference in references if reference in found]

    @property
    def position(self) -> SourcePosition:
        """The place after the last row."""
        buffer = array("q")
        for shard, entry in self._buffer:
            buffer.extend((shard, entry.offset, entry.index))
        return SourcePosition(self._epoch, self._place, self._offset, self._index, self._drawn, buffer)

    def next_row(self) -> Row | RowError:
        """Return the next row.

        Raises:
            RowError: If an epoch has no row for this stream.
        """
        while True:
            while not self._errors and len(self._buffer) < self._buffer_size and (entry := self._next_entry()):
                self._buffer.append(entry)
            if self._errors:
                self._drawn += 1
                return self._errors.pop(0)
            if self._buffer:
                return _parse(self._draw())
            if self._drawn == 0 and not self._layout.is_rest(self._number, self._epoch):
                raise RowError(
                    f"{self._name}: too few rows for {self._layout.parts} streams (ranks x --dataloader_num_workers)"
                )
            self._epoch += 1
            self._place, self._drawn, self._offset, self._index = 0, 0, -1, -1
            self._pieces = self._layout.pieces(self._number, self._epoch, self._part)

    def _draw(self) -> TarSample | _FileRow:
        layout = self._layout
        key = f"{layout.seed} {layout.generation} {self._number} {self._part} {self._epoch} {self._drawn}"
        chosen = random.Random(key).randrange(len(self._buffer))
        self._drawn += 1
        self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
        return self._buffer.pop()[1]

    def _next_entry(self) -> tuple[int, TarSample | _FileRow] | None:
        """Return the shard and the next sample of the epoch, and advance; ``None`` after an error or the last one."""
        while self._place < len(self._pieces):
            piece = self._pieces[self._place]
            if self._entries is None:
                begun = piece if self._index < 0 else piece._replace(offset=self._offset, sample=self._index)
                self._entries = self._read(self._epoch, begun)
            entry = next(self._entries, None)
            if entry is None or isinstance(entry, RowError) or not piece.modulus:
                self._entries, self._place, self._offset, self._index = None, self._place + 1, -1, -1
            else:
                self._offset, self._index = entry.end, entry.index + 1
            if isinstance(entry, RowError):  # of a whole shard: it is not worth a place in the buffer
                self._errors.append(entry)
                return None
            if entry is not None:
                return piece.shard, entry
        return None


class _RowReader:
    """Reads pieces of the order in which the rows of files are in an epoch."""

    def __init__(self, source: DataSource, seed: int) -> None:
        self._seed, self._bad = seed, list[RowError]()
        self._rows = load_rows(source, seed, self._bad.append)
        self._epoch, self._order = -1, array("i")

    def read(self, epoch: int, piece: Piece) -> Iterator[TarSample | _FileRow | RowError]:
        """Yield the rows of a piece."""
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = shuffled(len(self._rows) + len(self._bad), f"{self._seed} {epoch}")
        places = range(piece.sample, piece.sample + 1)
        if piece.modulus:
            first = piece.sample + (piece.remainder - piece.sample) % piece.modulus
            places = range(first, len(self._order), piece.modulus)
        for place in places:
            row = self._order[place]
            yield _FileRow(place, self._rows[row] if row < len(self._rows) else self._bad[row - len(self._rows)])


def _parse(entry: TarSample | _FileRow) -> Row | RowError:
    if isinstance(entry, _FileRow):
        return entry.row
    try:
        return parse_shard_sample(entry)
    except RowError as error:
        return error


def open_shards(
    paths: Sequence[str], kept: Mapping[str, Sequence[int]] | None = None
) -> Iterator[TarSample | RowError]:
    """Yield the raw samples of tar shards in order, or those of the indices in ``kept``; a bad shard is its error."""
    reader = ShardReader(paths, kept)
    for shard in range(len(paths)):
        yield from reader.read(0, Piece(shard, 0, 0, 1, 0))


def read_shards(stream: Iterator[TarSample | RowError]) -> Iterator[Row | RowError]:
    """Yield the rows of the samples of ``open_shards``; an invalid row is its error."""
    for sample in stream:
        yield sample if isinstance(sample, RowError) else _parse(sample)


def parse_shard_sample(sample: TarSample) -> Row:
    """Return the row of one sample of a tar shard: an image, and a caption or a conversation.

    The image is ``jpg``, ``jpeg``, ``png`` or ``webp``; the caption is ``txt``, or ``caption`` or ``text`` in ``json``.
    A ``json`` with ``conversations`` or ``messages`` is a row as ``parse_row`` documents it.

    Raises:
        RowError: If there is no image or no text, or the conversation is invalid.
    """
    origin, files = sample.origin, sample.files
    if sample.error:
        raise RowError(f"{origin}: {sample.error}")
    image = next((files[suffix] for suffix in _IMAGE_SUFFIXES if files.get(suffix)), None)
    if image is None:
        raise RowError(f"{origin}: no image; expected one of {', '.join(_IMAGE_SUFFIXES)}")
    try:
        text = files.get("txt", b"").decode("utf-8")
        fields = json.loads(files.get("json") or b"{}")
    except ValueError as error:  # invalid UTF-8 and invalid JSON
        raise RowError(f"{origin}: txt or json cannot be read ({error})") from error
    except RecursionError as error:
        raise RowError(f"{origin}: json is nested too deeply") from error
    if not isinstance(fields, dict):
        raise RowError(f"{origin}: json is not an object")
    if fields.keys() & {"conversations", "messages"}:
        return parse_row(fields, origin, images=[image])
    caption = text.strip() or fields.get("caption") or fields.get("text")
    if not isinstance(caption, str) or not caption.strip():
        raise RowError(f"{origin}: no caption; expected txt, or caption in json")
    return parse_row({"text": caption}, origin, images=[image])
