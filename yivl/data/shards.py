"""Tar shards as img2dataset writes them: their samples, read in pieces."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from yivl.data.rows import RowError
from yivl.data.shard_file import ShardFile, ShardUnavailableError
from yivl.data.stream_position import Piece
from yivl.data.tar_samples import DamagedShardError, TarSample, read_samples

logger = logging.getLogger(__name__)


class ShardReader:
    """Reads pieces of tar shards; the file that was read last stays open."""

    def __init__(self, paths: Sequence[str], kept: Mapping[str, Sequence[int]] | None = None) -> None:
        """Set the shards, and the indices of the samples to read if not all."""
        self._paths, self._kept = paths, kept
        self._file: ShardFile | None = None
        self._bad: dict[str, str] = {}
        self._unavailable: set[str] = set()

    def read(self, epoch: int, piece: Piece) -> Iterator[TarSample | RowError]:
        """Yield the samples of a piece, in every epoch the same; a damaged or unavailable shard ends with its error."""
        path = self._paths[piece.shard]
        if piece.modulus:
            self._unavailable.discard(path)
        elif path in self._unavailable:  # reported; not tried again for each of its samples
            return
        if self._file is None or self._file.path != path:
            if self._file is not None:
                self._file.close()
            self._file = ShardFile(path)
        try:
            samples = read_samples(self._file, piece.offset, piece.sample, self._wanted(path, piece))
            yield from samples if piece.modulus else islice(samples, 1)
        except DamagedShardError as error:
            yield self._report(path, "damaged", f"{path}: damaged shard ({error}); download it again")
        except ShardUnavailableError as error:
            self._unavailable.add(path)
            yield self._report(path, "could not be read", f"{error}; its other samples are left out of this epoch")

    def _wanted(self, path: str, piece: Piece) -> Callable[[int], bool]:
        """Return which samples of a shard are read, by index; of a subset, a stream reads each n-th."""
        if not piece.modulus:
            return lambda index: index == piece.sample
        if self._kept is None:
            return lambda index: index % piece.modulus == piece.remainder
        kept = self._kept[path]

        def is_wanted(index: int) -> bool:
            place = bisect_left(kept, index)
            return place < len(kept) and kept[place] == index and place % piece.modulus == piece.remainder

        return is_wanted

    def _report(self, path: str, problem: str, reason: str) -> RowError:
        """Return the error of a shard, and log how many of this reader's shards have each problem."""
        self._bad[path] = problem
        problems = list(self._bad.values())
        counts = ", ".join(f"{problems.count(kind):,} {kind}" for kind in dict.fromkeys(problems))
        logger.warning("%s (of %s shards: %s)", reason, f"{len(self._paths):,}", counts)
        return RowError(reason)
