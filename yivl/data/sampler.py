"""Rows of files as a data set, and their order: shuffled, grouped, cut into batches, shared by the processes."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset, Sampler

from yivl.data.encoding import Encoder, Example
from yivl.data.rows import Row, RowError

GROUP_SIZE = 50
"""Global batches that are sorted together by length: long enough to pad little, short enough to stay random. Source:
ours, after the lineage's sampler."""


@dataclass(frozen=True)
class RowDataset(Dataset[Example | None]):
    """Rows that are encoded when they are asked for.

    A bad row is ``None`` and left out of its batch, so that the order of all others does not depend on it.
    """

    rows: Sequence[Row]
    encoder: Encoder
    on_bad_row: Callable[[RowError], None]
    """Called with every bad row; may raise."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example | None:
        """Return one example, or ``None`` for a bad row."""
        return encode_or_none(self.rows[index], self.encoder, self.on_bad_row)


def encode_or_none(row: Row, encoder: Encoder, on_bad_row: Callable[[RowError], None]) -> Example | None:
    """Return the example of a row, or ``None`` after ``on_bad_row`` was told why there is none."""
    try:
        return encoder(row)
    except RowError as error:
        on_bad_row(error)
        return None


class BatchSampler(Sampler[list[int]]):
    """The batches of one process, in an order that follows from seed and epoch alone.

    In an epoch every row occurs exactly once. The last global batch may be smaller; where it has fewer rows than there
    are processes, some get an empty batch, for which ``Collator`` has a place holder.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Describe the order.

        Args:
            num_rows: Rows of the data set.
            batch_size: Rows of one process in one batch.
            seed: Of the shuffle.
            rank: Which process this is.
            world_size: Number of processes.
            lengths: Positions of every row: rows of similar length share a batch.
            groups: A class of every row (with or without a picture): a batch holds one class, as far as rows suffice.
        """
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.lengths, self.groups = lengths, groups
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches():
            yield batch[self.rank :: self.world_size]

    def _global_batches(self) -> list[list[int]]:
        """Return the batches of all processes together; only the last may be smaller."""
        size = self.batch_size * self.world_size
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(self.num_rows))
        generator.shuffle(order)
        if self.lengths is None and self.groups is None:
            return [order[start : start + size] for start in range(0, self.num_rows, size)]
        by_class: dict[int, list[int]] = {}
        for index in order:
            by_class.setdefault(0 if self.groups is None else self.groups[index], []).append(index)
        # Whole batches of one class; what is left over of the classes is mixed in the end.
        sorted_order: list[int] = []
        left_over: list[int] = []
        for _, members in sorted(by_class.items()):
            whole = len(members) // size * size
            for start in range(0, whole, size * GROUP_SIZE):
                sorted_order += self._by_length(members[start : min(start + size * GROUP_SIZE, whole)])
            left_over += members[whole:]
        sorted_order += self._by_length(left_over)
        batches = [sorted_order[start : start + size] for start in range(0, self.num_rows, size)]
        # The longest first, so that a lack of memory shows at once; the smaller one stays last.
        last = batches.pop() if len(batches[-1]) < size else None
        generator.shuffle(batches)
        if self.lengths is not None and batches:
            longest = max(range(len(batches)), key=lambda index: max(self._length(row) for row in batches[index]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return batches if last is None else [*batches, last]

    def _by_length(self, rows: list[int]) -> list[int]:
        return rows if self.lengths is None else sorted(rows, key=self._length, reverse=True)

    def _length(self, row: int) -> int:
        assert self.lengths is not None
        return self.lengths[row]


def modality_of(row: Row) -> int:
    """Return 1 for a row with pictures and 0 for text alone."""
    return int(bool(row.images))
