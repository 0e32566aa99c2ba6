"""Data loaders of a run: the flags of the data to the batches of this rank."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from yivl.checkpoint.format import RECORD, read_json
from yivl.data.collator import Collator
from yivl.data.encoding import Encoder
from yivl.data.row_table import RowTable, join
from yivl.data.rows import RowError
from yivl.data.sampler import BatchSampler, RowDataset
from yivl.data.shard_facts import ShardSubset, shared_fingerprint
from yivl.data.sources import DataSource, load_all_rows, load_rows, read_sources, select_rows
from yivl.data.stream_progress import StreamProgress
from yivl.data.streaming import StreamCollator, StreamDataset, StreamSampler
from yivl.errors import CheckpointError, YiVLError
from yivl.files.json_files import is_file
from yivl.train.arguments import DataArguments

logger = logging.getLogger(__name__)


class BatchLoader(DataLoader[Any]):
    """The batches of this rank. Seed and epoch determine their order, so a checkpoint stores nothing about them."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        if isinstance(self.batch_sampler, BatchSampler):
            self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class Batches:
    """Training batches and where they come from."""

    loader: BatchLoader
    sources: Sequence[Mapping[str, Any]]
    """For ``training_run.json``. ``fingerprint`` of the content. Files: ``source``, ``rows``, ``rows_per_epoch``,
    ``images`` (samples with images per epoch), ``subsampled`` if the weight has a fraction. If anything is streamed:
    ``source``, ``weight``, ``shards``, and ``rows`` of files and of shards with a limit. ``rows_found`` if the limit
    leaves out some; ``limited`` if it did not limit the epoch in earlier versions, which means all tar shards, and
    files with a weight above 1."""

    stream: StreamProgress | None = None
    """Where the streams of this rank are, if anything is streamed."""

    @property
    def mix(self) -> str:
        """The mixture as a table."""
        weight = "weight" if "weight" in self.sources[0] else "rows_per_epoch"
        total = sum(source[weight] for source in self.sources)
        columns = ["shards", "rows"] if weight == "weight" else ["rows", "rows_per_epoch", "images"]
        table = [["share", *(name.removeprefix("rows_").replace("_", " ") for name in columns), "source"]]
        for source in self.sources:
            counts = {name: f"{source[name]:,}" for name in columns if name in source}
            if "rows_found" in source:
                counts["rows"] += f" of {source['rows_found']:,}"
            cells = [counts.get(name, "-") for name in columns]
            table.append([f"{source[weight] / total:.1%}", *cells, source["source"]])
        widths = [max(11, *(len(cell) + 2 for cell in column)) for column in zip(*table, strict=True)]
        return "\n".join(
            f"{''.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))}  {name}"
            for *cells, name in table
        )

    def check_record(self, checkpoint: Path, *, allow_changed_data: bool = False) -> list[int]:
        """Check that a checkpoint was trained on the same subsamples of the same data; their paths may have changed.

        Returns the indices of the sources with another content.

        Args:
            checkpoint: To resume from.
            allow_changed_data: Warn of a source with another content, instead of an error.

        Raises:
            CheckpointError: If weights, limits or data differ, or the fraction of a weight was one subset for all
                epochs when it was written.
        """
        recorded = read_json(checkpoint / RECORD).get("sources")
        if not isinstance(recorded, list) or not all(isinstance(source, dict) for source in recorded):
            raise CheckpointError(f"{checkpoint / RECORD}: expected a list of sources; the checkpoint is damaged")
        for ours, theirs in zip(self.sources, recorded, strict=False):
            if "limited" in ours and "limited" not in theirs:
                raise CheckpointError(
                    f"{checkpoint}: max_rows did not limit the epochs of {ours['source']} when it was written, and "
                    "does now; start a new run"
                )
        for source in recorded:
            if "subsampled" not in source and source.get("rows_per_epoch", 0) % max(source.get("rows", 0), 1):
                raise CheckpointError(
                    f"{checkpoint}: the weight of {source.get('source')} selected the same rows in every epoch when it "
                    "was written, and now selects others in each; start a new run"
                )
        if len(recorded) != len(self.sources):
            raise CheckpointError(
                f"{checkpoint}: the data had {len(recorded)} sources when it was written, and has {len(self.sources)} "
                "now; use the former data, or start a new run"
            )
        changed = []
        for number, (ours, theirs) in enumerate(zip(self.sources, recorded, strict=True)):
            # What earlier versions did not record, or what is unavailable, is not compared.
            hashes = [facts["fingerprint"] for facts in (ours, theirs) if "fingerprint" in facts]
            has_changed = len(hashes) == 2 and hashes[0] != hashes[1]
            if has_changed:
                changed.append(number)
                change = f"{checkpoint}: the content of {ours['source']} has changed since it was written"
                if not allow_changed_data:
                    raise CheckpointError(
                        f"{change}; restore the former data, start a new run, or add --allow_changed_data True"
                    )
                logger.warning("%s; the run continues with the new content", change)
            of_the_content = () if has_changed else ("shards", "rows", "rows_found", "rows_per_epoch")
            for name in ("weight", *of_the_content):
                if ours.get(name, theirs.get(name)) != theirs.get(name, ours.get(name)):
                    raise CheckpointError(
                        f"{checkpoint}: {name} of {ours['source']} was {theirs[name]} when it was written, and is "
                        f"{ours[name]} now; use the former data, max_rows and weight, or start a new run"
                    )
        return changed


def make_batches(
    data: DataArguments, training: TrainingArguments, encoder: Encoder, on_bad_row: Callable[[RowError], None]
) -> Batches:
    """Return the training batches of this rank.

    Raises:
        RowError: If a source cannot be read, or no row is left.
        YiVLError: If a flag does not apply to streamed data.
    """
    sources = read_sources(
        data.data_path,
        data.image_folder,
        data.max_rows_per_source,
        allow_outside_images=data.allow_outside_images,
        allow_remote_data=data.allow_remote_data,
    )
    if data.packing and training.per_device_train_batch_size == 1:
        logger.warning("--packing has no effect with --per_device_train_batch_size 1: it packs the samples of a batch")
    if any(source.is_streamed for source in sources):
        return _streamed_batches(sources, data, training, encoder, on_bad_row)
    read = [_read_files(source, training.seed, on_bad_row) for source in sources]
    rows_of = [rows for rows, _ in read]
    rows = join(rows_of)
    if not rows:
        raise RowError(f"{data.data_path}: no row to train on")
    is_grouped = data.group_by_length or data.group_by_modality_length
    sampler = BatchSampler(
        [len(loaded) for loaded in rows_of],
        training.per_device_train_batch_size,
        samples_per_epoch=[source.samples_per_epoch(len(rows)) for source, rows in zip(sources, rows_of, strict=True)],
        seed=training.seed,
        rank=training.process_index,
        world_size=training.world_size,
        lengths=rows.lengths(encoder) if is_grouped else None,
        groups=rows.has_images if data.group_by_modality_length else None,
    )
    facts = [
        {
            "source": source.name,
            **_row_facts(len(loaded), found),
            "rows_per_epoch": total,
            "images": round(int(loaded.has_images.sum()) * total / max(len(loaded), 1)),
            "fingerprint": loaded.fingerprint,
        }
        | ({"subsampled": "per epoch"} if loaded and total % len(loaded) else {})
        | ({"limited": "per epoch"} if total < round(len(loaded) * source.weight) else {})
        for source, (loaded, found), total in zip(sources, read, sampler.samples_per_epoch, strict=True)
    ]
    _warn_of_limit(facts)
    dataset = RowDataset(rows, encoder, on_bad_row)
    return Batches(_loader(dataset, sampler, encoder, data, training), facts)


def _read_files(source: DataSource, seed: int, on_bad_row: Callable[[RowError], None]) -> tuple[RowTable, int]:
    """Return the rows of a source of files within its limit, and the number of all its rows; log their notices."""
    found = load_all_rows(source, on_bad_row)
    rows = select_rows(source, found, seed)
    _check_image_folder(source, rows)  # before weights are loaded
    _log_notices(rows)
    return rows, len(found)


def _streamed_batches(
    sources: Sequence[DataSource],
    data: DataArguments,
    training: TrainingArguments,
    encoder: Encoder,
    on_bad_row: Callable[[RowError], None],
) -> Batches:
    if training.max_steps <= 0:
        raise YiVLError("--max_steps is missing: tar shards are streamed without end; set the number of steps")
    if data.group_by_length or data.group_by_modality_length:
        raise YiVLError("--group_by_length: streamed rows have no known lengths; use --packing")
    batch_size = training.per_device_train_batch_size
    dataset = StreamDataset(
        sources,
        encoder,
        on_bad_row,
        batch_size,
        rank=training.process_index,
        world_size=training.world_size,
        num_slots=max(training.dataloader_num_workers, 1),
        seed=training.seed,
        shuffle_buffer=data.shuffle_buffer,
    )
    sampler = StreamSampler(batch_size, training.max_steps * training.gradient_accumulation_steps)
    facts = [
        {"source": source.name, "weight": source.weight}
        | (
            _shard_facts(source, training) | _subset_facts(dataset.subsets.get(source))
            if source.is_streamed
            else _file_facts(source, training.seed, on_bad_row)
        )
        for source in sources
    ]
    _warn_of_limit(facts)
    loader = _loader(dataset, sampler, encoder, data, training, wrap=StreamCollator)
    return Batches(loader, facts, StreamProgress(dataset))


def _shard_facts(source: DataSource, training: TrainingArguments) -> dict[str, Any]:
    found = shared_fingerprint(source, training.process_index, training.local_process_index)
    return {"shards": len(source.shards())} | ({} if found is None else {"fingerprint": found})


def _subset_facts(subset: ShardSubset | None) -> dict[str, Any]:
    if subset is None:
        return {}
    facts = _row_facts(sum(map(len, subset.kept.values())), subset.num_samples)
    return facts | ({"limited": "per epoch"} if "rows_found" in facts else {})


def _file_facts(source: DataSource, seed: int, on_bad_row: Callable[[RowError], None]) -> dict[str, Any]:
    rows, found = _read_files(source, seed, on_bad_row)
    return _row_facts(len(rows), found) | {"fingerprint": rows.fingerprint}


def _row_facts(rows: int, found: int) -> dict[str, Any]:
    return {"rows": rows} | ({"rows_found": found} if found > rows else {})


def _warn_of_limit(facts: Sequence[Mapping[str, Any]]) -> None:
    """Warn if the only source is cut: in a mixture, a limit balances the sources; alone, it only drops data."""
    if len(facts) == 1 and "rows_found" in facts[0]:
        used, found = facts[0]["rows"], facts[0]["rows_found"]
        logger.warning(
            "%s: %s of %s rows are used, the same in every epoch, although there is no other source to balance; to use "
            "all, give --max_rows_per_source %d (or max_rows in the mixture, repeat_time 1 in the meta file)",
            *(facts[0]["source"], f"{used:,}", f"{found:,}", found),
        )


def make_eval_loader(
    data: DataArguments, training: TrainingArguments, encoder: Encoder, on_bad_row: Callable[[RowError], None]
) -> BatchLoader | None:
    """Return the evaluation batches of this rank, or ``None`` without ``--eval_data_path``; weights do not apply.

    Raises:
        RowError: If a source cannot be read, or there is no row.
        YiVLError: If a source is streamed.
    """
    if data.eval_data_path is None:
        return None
    sources = read_sources(
        data.eval_data_path,
        data.image_folder,
        allow_outside_images=data.allow_outside_images,
        allow_remote_data=True,  # all tar shards are refused below
    )
    if streamed := [source.name for source in sources if source.is_streamed]:
        raise YiVLError(f"--eval_data_path: {streamed[0]}: tar shards are streamed without end; use .json or .jsonl")
    rows = join([load_rows(source, 0, on_bad_row) for source in sources])
    if not rows:
        raise RowError(f"{data.eval_data_path}: no row to evaluate on")
    _log_notices(rows)
    batch_size = training.per_device_eval_batch_size
    sampler = BatchSampler([len(rows)], batch_size, rank=training.process_index, world_size=training.world_size)
    return _loader(RowDataset(rows, encoder, on_bad_row), sampler, encoder, data, training)


def unwrap_worker_error(error: YiVLError) -> YiVLError:
    """Return the error of a data-loading worker without the worker's traceback, whose last line is the message."""
    kind = type(error)
    return kind(str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: "))


def _log_notices(rows: RowTable) -> None:
    for line in rows.notices():
        logger.warning("%s", line)


def _check_image_folder(source: DataSource, rows: RowTable) -> None:
    """Raise a ``RowError`` if none of the first images of a source exists: the ``--image_folder`` is wrong."""
    first = rows.first_images(20)
    if first and not any(is_file(image) for image in first):
        raise RowError(
            f"{source.name}: none of its first {len(first)} images exists, such as {first[0]}; set "
            "--image_folder, or image_folder in a mixture, to the base folder of relative paths"
        )


def set_up_worker(_: int = 0) -> None:
    """Prepare a data-loading worker: it leaves SIGUSR1 to its rank and keeps the memory of images.

    Slurm sends the signal to all processes. PyTorch handles SIGTERM, with which a rank ends its workers.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    keep_image_memory()


def keep_image_memory() -> None:
    """Let Pillow reuse the memory of images in this process, four blocks of at most 16 MB.

    Pillow returns it to the system after every image, whose pages are zeroed again for the next one: 1.7 times the time
    of decoding and resizing without its reuse, 1.4 times with it. Source: ours.
    """
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]


def _loader(
    dataset: Any,
    sampler: Any,
    encoder: Encoder,
    data: DataArguments,
    training: TrainingArguments,
    wrap: Callable[[Collator], Callable[[Any], dict[str, Any]]] = lambda collator: collator,
) -> BatchLoader:
    has_workers = training.dataloader_num_workers > 0
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=wrap(Collator(encoder.tokenizer.pad_token_id, packing=data.packing)),
        num_workers=training.dataloader_num_workers,
        worker_init_fn=set_up_worker,
        pin_memory=training.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=training.dataloader_persistent_workers and has_workers,
        prefetch_factor=training.dataloader_prefetch_factor if has_workers else None,
        # A separate generator: reading data must not advance the random state of training.
        generator=torch.Generator().manual_seed(training.seed),
    )
