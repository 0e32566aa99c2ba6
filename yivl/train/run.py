"""The steps of a training run, in the order in which ``yivl.train.__main__`` takes them."""

import logging
import os
import signal
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from yivl import command_line
from yivl.checkpoint.atomic import write_json
from yivl.data.bad_rows import BadRows
from yivl.data.encoding import Encoder
from yivl.data.rows import RowError
from yivl.errors import CheckpointError, Stopped
from yivl.model.cpu import has_native_bfloat16
from yivl.train import parameters
from yivl.train.arguments import Arguments, YiVLTrainingArguments
from yivl.train.compilation import describe_compilation
from yivl.train.cpu_threads import describe_threads
from yivl.train.damage import check_files
from yivl.train.dataloaders import Batches, BatchLoader, make_batches, make_eval_loader, unwrap_worker_error
from yivl.train.initialization import Start, empty_start, load_start, read_start
from yivl.train.nodes import check_data, check_output_dir
from yivl.train.plan import RunPlan, as_dict, trainer_arguments
from yivl.train.ranks import on_rank_0
from yivl.train.resume import (
    check_same_run,
    describe_resume,
    find_checkpoint,
    is_finished,
    load_trained,
    remove_leftovers,
)
from yivl.train.run_lock import run_lock
from yivl.train.trainer import YiVLTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that a run needs except the weights."""

    arguments: Arguments
    plan: RunPlan
    args: TrainingArguments
    start: Start
    encoder: Encoder
    batches: Batches
    eval_loader: BatchLoader | None
    bad_rows: BadRows
    checkpoint: Path | None
    """To resume from."""
    total_steps: int

    @property
    def is_finished(self) -> bool:
        """Whether a resumed run has nothing left to do."""
        return self.checkpoint is not None and is_finished(self.checkpoint, self.args.output_dir, self.total_steps)


def prepare(arguments: Arguments, plan: RunPlan, resources: ExitStack) -> Run:
    """Set up the process, and read the checkpoint's small files and the data, so that errors show before weights load.

    Args:
        arguments: The flags.
        plan: Of these flags.
        resources: Takes the lock of the output folder, which is released when it closes.

    Raises:
        YiVLError: If the checkpoint, the data or the output folder cannot be used, or a resumed run had other flags.
    """
    model, data, training = arguments
    args = trainer_arguments(arguments, plan)
    if args.process_index:
        command_line.set_log_level(logging.ERROR)
    set_seed(training.seed)
    if args.device.type == "cpu":
        logger.info("%s", describe_threads())
        if training.bf16 and not training.dry_run and not has_native_bfloat16():
            logger.warning("--bf16 True: this CPU emulates bfloat16, which is slower than float32; give --bf16 False")
    if training.deepspeed and not training.dry_run:
        import deepspeed

        if notice := describe_compilation(plan.zero):
            logger.info("%s", notice)
        # Before the model is built: ZeRO-3 partitions its weights as they are created.
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=args.ddp_timeout_delta)
    checkpoint = None if training.dry_run else _open_output(args, training, resources)
    with args.main_process_first(desc="reading the checkpoint folder"):
        start = read_start(model, device=args.device, weights=not training.dry_run)
    num_patches = start.config.num_patches_at(start.image_size)
    encoder = Encoder(
        start.tokenizer, start.image_processor, num_patches, data.model_max_length, start.config.prompt_template
    )
    # A dry run writes nothing to the output folder, and a new run does not count the bad rows of an earlier one.
    folder = Path(tempfile.gettempdir(), f"yivl-dry-run-{os.getpid()}") if training.dry_run else Path(args.output_dir)
    bad_rows = BadRows(data.on_bad_row, folder / "bad_rows.jsonl")
    if checkpoint is None and args.process_index == 0:
        bad_rows.path.unlink(missing_ok=True)
    batches = make_batches(data, args, encoder, bad_rows)
    eval_loader = make_eval_loader(data, args, encoder, bad_rows)
    check_data(data.data_path, batches.sources)
    logger.info("%s", batches.mix)
    total_steps = plan.total_steps(training, len(batches.loader))
    run = Run(arguments, plan, args, start, encoder, batches, eval_loader, bad_rows, checkpoint, total_steps)
    if checkpoint is not None and not run.is_finished:
        check_same_run(checkpoint, as_dict(arguments, args), total_steps)
        changed = batches.check_record(checkpoint, allow_changed_data=training.allow_changed_data)
        if batches.stream is not None:
            batches.stream.resume(checkpoint, changed)
    return run


def _open_output(args: TrainingArguments, training: YiVLTrainingArguments, resources: ExitStack) -> Path | None:
    """Lock the output folder, remove what interrupted runs left, and return the checkpoint to resume from, checked.

    Raises:
        YiVLError: If another run writes to the folder, or it is not shared, or there is no such checkpoint, or that is
            damaged.
    """
    output_dir = Path(args.output_dir)
    on_rank_0(lambda: resources.enter_context(run_lock(output_dir)))
    on_rank_0(lambda: remove_leftovers(output_dir))
    if training.save_strategy != "no" or training.resume:
        check_output_dir(args.output_dir)
    checkpoint = on_rank_0(lambda: find_checkpoint(output_dir, training.resume))
    if checkpoint is not None:
        check_files(checkpoint)
    return checkpoint


def build_model(run: Run) -> tuple[Any, list[parameters.PartSize]]:
    """Return the model with its trainable parameters selected, on the meta device for a dry run, and their numbers.

    Raises:
        YiVLError: If weights are missing or do not fit, or no parameter is trainable.
    """
    model_arguments, data, training = run.arguments
    model: Any
    if training.dry_run:
        model = empty_start(run.start)
    else:
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        device = run.args.device
        model = load_start(run.start, model_arguments, dtype=dtype, packing=data.packing, device=device)
    return parameters.set_up_model(model, run.arguments, base=os.path.abspath(run.start.folder))


def fit(run: Run, model: torch.nn.Module) -> tuple[YiVLTrainer, dict[str, float]]:
    """Train the model, and return the trainer and its metrics.

    Raises:
        Stopped: If a signal stopped the run before its last step, with the exit code that a shell gives the signal.
    """
    training = run.arguments.training
    if run.plan.zero.is_fsdp and run.checkpoint is not None:
        load_trained(model, run.checkpoint)
    trainer = YiVLTrainer(
        model,
        run.args,
        run.batches,
        arguments=run.arguments,
        encoder=run.encoder,
        eval_loader=run.eval_loader,
        offloads_optimizer=run.plan.zero.offloads_optimizer,
    )
    if training.resume:
        logger.info("resuming from %s", run.checkpoint or "the first step: there is no checkpoint yet")
    try:
        result = trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    except KeyboardInterrupt:
        _report_stop(trainer, "interrupted")
        raise
    except (RowError, CheckpointError) as error:
        raise unwrap_worker_error(error) from error
    if (number := trainer.stop.received) and trainer.state.global_step < trainer.state.max_steps:
        _report_stop(trainer, f"stopped by {signal.Signals(number).name}")
        raise Stopped(128 + number)
    return trainer, result.metrics


def _report_stop(trainer: YiVLTrainer, what: str) -> None:
    logger.info("%s at step %d; %s", what, trainer.state.global_step, describe_resume(trainer.args.output_dir))


def save(run: Run, trainer: YiVLTrainer, metrics: dict[str, float]) -> None:
    """Write the metrics and the trained model to the output folder."""
    if run.args.should_save:
        write_json(Path(run.args.output_dir) / "train_results.json", metrics)
    trainer.save_final()
    speed = metrics["train_samples_per_second"]
    logger.info("train_samples_per_second %s; the model is in %s", speed, run.args.output_dir)
