"""Positions of streams: what each has read, what is left of an epoch, and its split over other streams."""

import json
import random
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from yivl.checkpoint.atomic import write_text
from yivl.errors import CheckpointError

POSITION: Final = "data_position.json"
"""File of a checkpoint: the positions of all streams of all ranks."""
_VERSION: Final = 1


class Piece(NamedTuple):
    """Samples of one shard that one stream reads, in order.

    Files of rows are one shard: its samples are the rows in the order of the epoch.
    """

    shard: int
    """Index of the shard in its source."""
    offset: int
    """Of the first header of the first sample, in bytes."""
    sample: int
    """Index of that sample in the shard."""
    modulus: int
    """From there on, each sample whose index modulo ``modulus`` is ``remainder``; 0 is that sample alone."""
    remainder: int


@dataclass(frozen=True)
class SourcePosition:
    """Where a stream is in one source."""

    epoch: int = 0
    place: int = 0
    """In the list of the pieces of the epoch."""
    offset: int = -1
    """Of the next sample of this piece, in bytes; -1 if the piece was not opened."""
    index: int = -1
    drawn: int = 0
    """Rows of the epoch that were returned; they number the draws from the shuffle buffer."""
    buffer: "array[int]" = field(default_factory=lambda: array("q"))
    """Shard, offset and index of each sample in the shuffle buffer."""

    def remaining(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return what is left of the pieces of this epoch."""
        numbers = iter(self.buffer)
        buffered = [Piece(*entry, 0, 0) for entry in zip(numbers, numbers, numbers, strict=True)]
        rest = list(pieces[self.place :])
        if rest and self.index >= 0:
            rest[0] = rest[0]._replace(offset=self.offset, sample=self.index)
        return buffered + rest


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream is: after ``rows`` rows of all sources."""

    rows: int
    sources: tuple[SourcePosition, ...]


def split_pieces(pieces: Sequence[Piece], part: int, parts: int) -> list[Piece]:
    """Return the pieces of one of ``parts`` streams: whole ones if there are enough, else a part of each.

    Over all parts, each sample is in exactly one piece.
    """
    single = [piece for piece in pieces if not piece.modulus]
    long = [piece for piece in pieces if piece.modulus]
    if len(long) >= parts:
        return single[part::parts] + long[part::parts]
    return single[part::parts] + [
        # Which part begins rotates, so that the last samples of the shards do not all go to the same streams.
        piece._replace(
            modulus=piece.modulus * parts, remainder=piece.remainder + piece.modulus * ((part + number) % parts)
        )
        for number, piece in enumerate(long)
    ]


@dataclass(frozen=True)
class Layout:
    """Which stream reads which pieces, in every epoch of every source."""

    shards: Sequence[Sequence[int]]
    """Of every source, the indices of the shards that are read; ``[0]`` for files."""
    parts: int
    """Streams: ranks x data-loading workers."""
    seed: int = 0
    generation: int = 0
    """How often the rest of an epoch was split over another number of streams."""
    rests: Sequence[Mapping[int, Sequence[Sequence[Piece]]]] = ()
    """Of every source, epochs of which a part was read before that: the pieces of every stream."""

    def pieces(self, source: int, epoch: int, part: int) -> Sequence[Piece]:
        """Return the pieces of an epoch of a source that stream ``part`` reads, in order."""
        if self.is_rest(source, epoch):
            return self.rests[source][epoch][part]
        shards = list(self.shards[source])
        random.Random(f"{self.seed} {epoch}").shuffle(shards)
        return split_pieces([Piece(shard, 0, 0, 1, 0) for shard in shards], part, self.parts)

    def is_rest(self, source: int, epoch: int) -> bool:
        """Return whether a part of the epoch was read by another number of streams."""
        return bool(self.rests) and epoch in self.rests[source]

    def start(self) -> StreamPosition:
        """Return the position of a stream that has read nothing."""
        first = (min(self.rests[source], default=0) if self.rests else 0 for source in range(len(self.shards)))
        return StreamPosition(0, tuple(SourcePosition(epoch) for epoch in first))

    def split_rest(self, positions: Sequence[StreamPosition], parts: int) -> "Layout":
        """Return the layout in which ``parts`` streams read exactly what the streams at ``positions`` have not.

        Streams may be in different epochs: all epochs that one of them, or one before them, has begun are split.
        """
        rests: list[dict[int, list[list[Piece]]]] = []
        for source in range(len(self.shards)):
            places = [position.sources[source] for position in positions]
            epochs: dict[int, list[list[Piece]]] = {}
            last = max(place.epoch for place in places)
            if self.rests:
                last = max([last, *self.rests[source]])
            for epoch in range(min(place.epoch for place in places), last + 1):
                rest: list[Piece] = []
                for part, place in enumerate(places):
                    if place.epoch <= epoch:
                        pieces = self.pieces(source, epoch, part)
                        rest += place.remaining(pieces) if place.epoch == epoch else pieces
                rest.sort()  # single samples are read in the order of the shards
                epochs[epoch] = [split_pieces(rest, part, parts) for part in range(parts)]
            rests.append(epochs)
        return Layout(self.shards, parts, self.seed, self.generation + 1, rests)


@dataclass(frozen=True)
class DataPosition:
    """The positions of all streams of a run."""

    layout: Layout
    positions: Sequence[StreamPosition]
    """Of every stream."""

    def resume(self, parts: int) -> "DataPosition":
        """Return where ``parts`` streams continue: these streams, or others that read what these have not."""
        if parts == self.layout.parts:
            return self
        layout = self.layout.split_rest(self.positions, parts)
        return DataPosition(layout, [layout.start()] * parts)

    def restart(self, source: int) -> "DataPosition":
        """Return the same positions, with all streams at the start of an epoch of a source that none has begun."""
        rests = [dict(epochs) for epochs in self.layout.rests]
        begun = [position.sources[source].epoch for position in self.positions]
        if rests:
            begun += rests[source]
            rests[source] = {}
        place = SourcePosition(max(begun) + 1)
        positions = [
            replace(position, sources=(*position.sources[:source], place, *position.sources[source + 1 :]))
            for position in self.positions
        ]
        return DataPosition(replace(self.layout, rests=rests), positions)

    def write(self, folder: Path) -> None:
        """Write ``POSITION``."""
        rests = []
        for source, epochs in enumerate(self.layout.rests):
            oldest = min(position.sources[source].epoch for position in self.positions)
            rests.append({epoch: pieces for epoch, pieces in epochs.items() if epoch >= oldest})
        fields = {
            "version": _VERSION,
            "generation": self.layout.generation,
            "shards": [len(shards) for shards in self.layout.shards],
            "rests": rests,
            "streams": [
                {
                    "rows": position.rows,
                    "sources": [vars(source) | {"buffer": source.buffer.tolist()} for source in position.sources],
                }
                for position in self.positions
            ],
        }
        write_text(folder / POSITION, json.dumps(fields) + "\n")


def read_position(
    folder: Path, shards: Sequence[Sequence[int]], seed: int, changed: Collection[int] = ()
) -> DataPosition:
    """Return the positions that a checkpoint holds.

    Args:
        folder: Of the checkpoint.
        shards: As in ``Layout``.
        seed: Of the run.
        changed: Indices of the sources whose content is another than that of the checkpoint: they restart.

    Raises:
        CheckpointError: If there are none, they cannot be read, or they are of other data.
    """
    path = folder / POSITION
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: {POSITION} is missing, so that the place in the tar shards is unknown: an earlier version "
            "wrote the checkpoint, or it is damaged; finish the run with that version, or start a new one"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != _VERSION:
            raise ValueError(f"version {fields['version']}")
        rests = [
            {int(epoch): [[Piece(*piece) for piece in part] for part in split] for epoch, split in epochs.items()}
            for epochs in fields["rests"]
        ]
        positions = [_stream_position(entry) for entry in fields["streams"]]
        counts, generation = fields["shards"], int(fields["generation"])
        if not positions or any(len(position.sources) != len(counts) for position in positions):
            raise ValueError("positions do not fit the sources")
        if any(len(split) != len(positions) for epochs in rests for split in epochs.values()):
            raise ValueError("rests do not fit the streams")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); resume from an earlier checkpoint"
        ) from error
    now = [len(of_source) for of_source in shards]
    if len(counts) != len(now) or any(counts[i] != now[i] for i in range(len(now)) if i not in changed):
        raise CheckpointError(
            f"{path}: the sources had {counts} tar shards when it was written, and have "
            f"{now} now; use the former data, or start a new run"
        )
    position = DataPosition(Layout(shards, len(positions), seed, generation, rests), positions)
    for source in changed:
        position = position.restart(source)
    return position


def _stream_position(entry: Mapping[str, Any]) -> StreamPosition:
    names = ("epoch", "place", "offset", "index", "drawn")
    sources = (
        SourcePosition(**{name: int(source[name]) for name in names}, buffer=array("q", source["buffer"]))
        for source in entry["sources"]
    )
    return StreamPosition(int(entry["rows"]), tuple(sources))
