"""Which streamed batches the trainer of this rank has received, for its checkpoints."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from yivl.data.stream_position import DataPosition, StreamPosition, read_position
from yivl.data.streaming import StreamDataset

logger = logging.getLogger(__name__)


@dataclass
class StreamProgress:
    """The positions after the batches that were received; data-loading workers are ahead of them."""

    dataset: StreamDataset
    _received: dict[int, StreamPosition] = field(default_factory=dict, init=False)
    """By the index of the stream over all ranks."""

    def receive(self, batches: Sequence[dict[str, Any]]) -> None:
        """Remove ``position`` from the batches of a step and remember it."""
        for batch in batches:
            position = batch.pop("position")
            self._received[position.part] = position.position

    def resume(self, checkpoint: Path, changed: Collection[int] = ()) -> None:
        """Let the streams continue where those of a checkpoint were; must be called before the first batch is read.

        With as many streams (ranks x data-loading workers) the order is the same as without an interruption. Others
        read, in another order, exactly what is left of the epochs that have begun. Sources whose indices are in
        ``changed`` have another content than before and start with the next epoch.

        Raises:
            CheckpointError: If the checkpoint has no position, or it is of other data.
        """
        dataset = self.dataset
        saved = read_position(checkpoint, dataset.shard_numbers, dataset.seed, changed)
        for source in changed:
            logger.warning("%s: starts with a new epoch, since its content has changed", dataset.sources[source].name)
        before, now = saved.layout.parts, dataset.start.layout.parts
        if before != now:
            logger.warning(
                "%s has the positions of %d streams (ranks x --dataloader_num_workers), and this run has %d: they read "
                "each sample that is left of the epoch once, in another order",
                *(checkpoint, before, now),
            )
        dataset.start = saved.resume(now)

    def write(self, folder: Path) -> None:
        """Write the positions of all ranks to a folder; all ranks must call it, and rank 0 writes."""
        gathered: list[Mapping[int, StreamPosition]] = gather_object([self._received])
        if self.dataset.rank == 0:
            received = {part: position for of_rank in gathered for part, position in of_rank.items()}
            start = self.dataset.start
            positions = [received.get(part, position) for part, position in enumerate(start.positions)]
            DataPosition(start.layout, positions).write(folder)
