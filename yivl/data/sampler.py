"""Rows as a dataset, and the batches of an epoch: subsampled, shuffled, grouped, sharded across ranks."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Sample, encode_or_skip
from yivl.data.rows import Row, RowError
from yivl.data.sources import subsample

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
        lengths: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
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
        for batch in self._global_batches():
            yield batch[self.rank :: self.world_size]

    def _epoch_indices(self) -> list[int]:
        """Return the dataset indices of the epoch, not shuffled: whole repeats, and a subsample for the fraction."""
        indices: list[int] = []
        start = 0
        for source, (number, total) in enumerate(zip(self.num_rows, self.samples_per_epoch, strict=True)):
            rows = range(start, start + number)
            repeats, rest = divmod(total, max(number, 1))
            indices += [*rows] * repeats + subsample(rows, rest, f"{self.seed} {self.epoch} {source}")
            start += number
        return indices

    def _global_batches(self) -> list[list[int]]:
        """Return the batches of all ranks together; only the last may be smaller."""
        size = self.batch_size * self.world_size
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = self._epoch_indices()
        generator.shuffle(order)
        if self.lengths is None and self.groups is None:
            return [order[start : start + size] for start in range(0, len(order), size)]
        lengths, groups = (values or [0] * sum(self.num_rows) for values in (self.lengths, self.groups))
        # Full batches of one class; the remainders of the classes are mixed at the end.
        sorted_order: list[int] = []
        remainder: list[int] = []
        for group in sorted(set(groups)):
            members = [index for index in order if groups[index] == group]
            full = len(members) // size * size
            for start in range(0, full, size * GROUP_SIZE):
                part = members[start : min(start + size * GROUP_SIZE, full)]
                sorted_order += sorted(part, key=lengths.__getitem__, reverse=True)
            remainder += members[full:]
        sorted_order += sorted(remainder, key=lengths.__getitem__, reverse=True)
        batches = [sorted_order[start : start + size] for start in range(0, len(order), size)]
        # The longest batch comes first, so that out-of-memory errors show at once; the smaller one stays last.
        last = batches.pop() if len(batches[-1]) < size else None
        generator.shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda index: max(lengths[row] for row in batches[index]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return batches if last is None else [*batches, last]
