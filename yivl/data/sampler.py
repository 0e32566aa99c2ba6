"""Rows as a dataset, and the batches of an epoch: subsampled, shuffled, grouped, sharded across ranks."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Sample, encode_or_skip
from yivl.data.orders import index_type, subsample
from yivl.data.rows import Row, RowError

GROUP_SIZE = 50
"""Global batches that are sorted together by length: enough to pad little, few enough to stay random. Source: ours,
after the length-grouped sampler of LLaVA."""


@dataclass(frozen=True)
class RowDataset(Dataset[Sample | None]):
    """Rows, encoded on access; an invalid row is ``None``, so that the order does not depend on it."""

    rows: Sequence[Row]
    encoder: Encoder
    on_bad_row: Callable[[RowError], None]
    """Called with every invalid row; may raise."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | None:
        return encode_or_skip(self.rows[index], self.encoder, self.on_bad_row)


class BatchSampler(Sampler[list[int]]):
    """The batches of one rank; seed and epoch alone determine them.

    An epoch has the same number of samples every time, and no sample is on two ranks. The last global batch may be
    smaller; if it has fewer samples than there are ranks, some ranks get an empty one (see ``Collator``).
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        batch_size: int,
        *,
        samples_per_epoch: Sequence[int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
        groups: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Set the order.

        Args:
            num_rows: Rows of every source; the dataset holds one source after the other.
            batch_size: Samples per batch of one rank.
            samples_per_epoch: Samples of every source in an epoch, as ``DataSource.samples_per_epoch`` returns them; by
                default every row once.
            seed: Of the shuffle and of the subsample.
            rank: Index of this rank.
            world_size: Number of ranks.
            lengths: Sequence length of every row; a batch has rows of similar length.
            groups: Class of every row (with or without an image); a batch has one class as far as possible.
        """
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.lengths, self.groups = lengths, groups
        self.samples_per_epoch = num_rows if samples_per_epoch is None else samples_per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self.samples_per_epoch) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.world_size
        order, starts = self._global_batches(size)
        for start in starts:
            yield order[start : start + size][self.rank :: self.world_size].tolist()

    def _epoch_indices(self) -> "array[int]":
        """Return the dataset indices of the epoch, not shuffled: whole repeats, and a subsample for the fraction."""
        indices = array(index_type(sum(self.num_rows)))
        start = 0
        for source, (number, total) in enumerate(zip(self.num_rows, self.samples_per_epoch, strict=True)):
            repeats, rest = divmod(total, max(number, 1))
            for _ in range(repeats):
                indices.extend(range(start, start + number))
            chosen = subsample(number, rest, f"{self.seed} {self.epoch} {source}")
            indices.extend(start + index for index in chosen)
            start += number
        return indices

    def _global_batches(self, size: int) -> tuple[np.ndarray, Iterable[int]]:
        """Return the samples of an epoch, and where the batches of all ranks start; only the last may be smaller."""
        generator = random.Random(f"{self.seed} {self.epoch}")
        indices = self._epoch_indices()
        generator.shuffle(indices)  # an array: a list would hold 36 bytes for each row
        order = np.frombuffer(indices, dtype=indices.typecode)
        if self.lengths is None and self.groups is None:
            return order, range(0, len(order), size)
        rows = sum(self.num_rows)
        lengths = np.zeros(rows, np.int32) if self.lengths is None else np.asarray(self.lengths)
        groups = np.zeros(rows, np.uint8) if self.groups is None else np.asarray(self.groups)
        # Full batches of one class; the remainders of the classes are mixed at the end.
        parts: list[np.ndarray] = []
        remainder: list[np.ndarray] = []
        of_order = groups[order]
        for group in np.unique(of_order):
            members = order[of_order == group]
            full = len(members) // size * size
            parts += np.split(members[:full], range(size * GROUP_SIZE, full, size * GROUP_SIZE))
            remainder.append(members[full:])
        order = np.concatenate([_longest_first(part, lengths) for part in (*parts, np.concatenate(remainder))])
        # The longest batch comes first, so that out-of-memory errors show at once; the smaller one stays last.
        full = len(order) // size
        batches = array("q", range(full))
        generator.shuffle(batches)
        if batches:
            longest = int(lengths[order[: full * size]].reshape(full, size).max(axis=1)[batches].argmax())
            batches[0], batches[longest] = batches[longest], batches[0]
        if len(order) % size:
            batches.append(full)
        return order, (batch * size for batch in batches)


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return rows by descending length, those of the same length in their order."""
    return rows[np.argsort(-lengths[rows].astype(np.int64), kind="stable")]
