"""The flags of a run to its data: rows or streams, their order, and batches for this process."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from yivl.data.bad_rows import BadRows
from yivl.data.encoding import Collator, Encoder
from yivl.data.rows import Row, RowError
from yivl.data.sampler import BatchSampler, RowDataset, modality_of
from yivl.data.sources import Source, load_rows, read_sources, weigh_rows
from yivl.data.streaming import StreamDataset, StreamSampler
from yivl.errors import YiVLError
from yivl.train.arguments import DataArguments

logger = logging.getLogger(__name__)


class BatchLoader(DataLoader[Any]):
    """Batches of this process. Seed and epoch decide their order, so nothing needs to be saved to go on with them."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        if isinstance(self.batch_sampler, BatchSampler):
            self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class Batches:
    """What a run learns from."""

    loader: BatchLoader
    sources: Sequence[Mapping[str, Any]]
    """Each with its ``source``, and ``rows``, ``rows_per_epoch`` and ``pictures``; in a stream ``weight`` and, of tars,
    ``shards``."""

    @property
    def mix(self) -> str:
        """The sources as a table for people."""
        return _stream_table(self.sources) if "weight" in self.sources[0] else _row_table(self.sources)


def make_batches(data: DataArguments, training: TrainingArguments, encoder: Encoder, on_bad_row: BadRows) -> Batches:
    """Return the training batches of this process.

    Raises:
        RowError: If a source cannot be read, or no row is left.
        YiVLError: If flags do not go with streams.
    """
    sources = read_sources(data.data_path, data.image_folder, data.max_rows_per_source)
    if data.packing and training.per_device_train_batch_size == 1:
        logger.warning("--packing packs the rows of a batch: with --per_device_train_batch_size 1 there is one")
    collator = Collator(encoder.tokenizer.pad_token_id, packing=data.packing)
    rank, world_size, batch_size = training.process_index, training.world_size, training.per_device_train_batch_size
    if any(source.is_stream for source in sources):
        if training.max_steps <= 0:
            raise YiVLError("tar shards have no known end; say how long to train by --max_steps")
        if data.group_by_length or data.group_by_modality_length:
            raise YiVLError("rows of a stream cannot be grouped, their lengths are not known; use --packing")
        stream = StreamDataset(
            sources,
            encoder,
            on_bad_row,
            batch_size,
            rank=rank,
            world_size=world_size,
            num_slots=max(training.dataloader_num_workers, 1),
            seed=training.seed,
            shuffle_buffer=data.shuffle_buffer,
        )
        numbers = StreamSampler(batch_size, training.max_steps * training.gradient_accumulation_steps)
        return Batches(_loader(stream, numbers, collator, training), _stream_facts(sources))
    parts = [load_rows(source, training.seed, on_bad_row) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        _check_image_folder(source, part)
    weighted = [weigh_rows(part, source.weight, training.seed) for part, source in zip(parts, sources, strict=True)]
    rows = [row for part in weighted for row in part]
    if not rows:
        raise RowError(f"{data.data_path}: no row to train on")
    lengths = groups = None
    if data.group_by_length or data.group_by_modality_length:
        quiet = not training.should_log or training.disable_tqdm
        lengths = [encoder.num_positions(row) for row in tqdm(rows, desc="lengths of rows", disable=quiet)]
    if data.group_by_modality_length:
        groups = [modality_of(row) for row in rows]
    sampler = BatchSampler(
        len(rows),
        batch_size,
        seed=training.seed,
        rank=rank,
        world_size=world_size,
        lengths=lengths,
        groups=groups,
    )
    dataset = RowDataset(rows, encoder, on_bad_row)
    return Batches(_loader(dataset, sampler, collator, training), _row_facts(sources, parts, weighted))


def own_words(error: RowError) -> RowError:
    """Return the error of a data-loading worker without the worker's traceback; its last line is what we said."""
    prefix = f"{RowError.__module__}.{RowError.__qualname__}: "
    return RowError(str(error).strip().splitlines()[-1].removeprefix(prefix))


def _check_image_folder(source: Source, rows: Sequence[Row]) -> None:
    """Find a wrong ``--image_folder`` before weights are loaded, and not row by row.

    Raises:
        RowError: If none of the first pictures of a source exists.
    """
    first = list(islice((image for row in rows for image in row.images if isinstance(image, Path)), 20))
    if first and not any(image.is_file() for image in first):
        raise RowError(
            f"{source.data_path}: none of its first {len(first)} pictures exists, such as {first[0]}; give the folder "
            "where relative paths start by --image_folder, or image_folder in a mixture"
        )


def make_eval_loader(
    data: DataArguments, training: TrainingArguments, encoder: Encoder, on_bad_row: BadRows
) -> BatchLoader | None:
    """Return the batches of this process whose loss is measured, if any.

    Raises:
        RowError: If a source cannot be read, or there is no row.
    """
    if data.eval_data_path is None:
        return None
    sources = read_sources(data.eval_data_path, data.image_folder)
    rows = [row for source in sources for row in load_rows(source, 0, on_bad_row)]
    if not rows:
        raise RowError(f"{data.eval_data_path}: no row to evaluate on")
    rank, world_size = training.process_index, training.world_size
    sampler = BatchSampler(len(rows), training.per_device_eval_batch_size, rank=rank, world_size=world_size)
    collator = Collator(encoder.tokenizer.pad_token_id, packing=data.packing)
    return _loader(RowDataset(rows, encoder, on_bad_row), sampler, collator, training)


def _loader(dataset: Any, sampler: Any, collator: Collator, training: TrainingArguments) -> BatchLoader:
    has_workers = training.dataloader_num_workers > 0
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=training.dataloader_num_workers,
        pin_memory=training.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=training.dataloader_persistent_workers and has_workers,
        prefetch_factor=training.dataloader_prefetch_factor if has_workers else None,
        # Of its own, so that reading data leaves the random numbers of the training alone.
        generator=torch.Generator().manual_seed(training.seed),
    )


def _row_facts(
    sources: Sequence[Source], parts: Sequence[Sequence[Row]], weighted: Sequence[Sequence[Row]]
) -> list[dict[str, Any]]:
    return [
        {
            "source": source.data_path,
            "rows": len(part),
            "rows_per_epoch": len(rows),
            "pictures": Counter(modality_of(row) for row in rows)[1],
        }
        for source, part, rows in zip(sources, parts, weighted, strict=True)
    ]


def _stream_facts(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [
        {"source": source.data_path, "weight": source.weight}
        | ({"shards": len(source.shards())} if source.is_stream else {})
        for source in sources
    ]


def _row_table(facts: Sequence[Mapping[str, Any]]) -> str:
    total = sum(fact["rows_per_epoch"] for fact in facts)
    lines = [f"{'rows':>10}{'per epoch':>11}{'share':>7}{'pictures':>10}  source"]
    for fact in facts:
        rows = fact["rows_per_epoch"]
        lines.append(f"{fact['rows']:>10,}{rows:>11,}{rows / total:>7.1%}{fact['pictures']:>10,}  {fact['source']}")
    return "\n".join(lines)


def _stream_table(facts: Sequence[Mapping[str, Any]]) -> str:
    total = sum(fact["weight"] for fact in facts)
    lines = [f"{'share':>7}{'shards':>8}  source"]
    for fact in facts:
        shards = f"{fact['shards']:,}" if "shards" in fact else "-"
        lines.append(f"{fact['weight'] / total:>7.1%}{shards:>8}  {fact['source']}")
    return "\n".join(lines)
