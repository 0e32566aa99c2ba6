"""Train Yi-VL: the published stages, full fine-tuning, LoRA and QLoRA.

python -m yivl.train --model_name_or_path CHECKPOINT --data_path rows.json --image_folder images --output_dir out

The scripts of ``scripts/`` call this with the flags of each case; docs/training.md explains them.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl import command_line
from yivl.errors import YiVLError
from yivl.train.arguments import Arguments, parse_arguments
from yivl.train.plan import RunPlan, as_dict, prepare_environment, trainer_arguments

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from yivl.data.bad_rows import BadRows
    from yivl.data.encoding import Encoder
    from yivl.model.configuration import YiVLConfig
    from yivl.train.dataloaders import Batches, BatchLoader
    from yivl.train.initialization import Start
    from yivl.train.parameters import PartSize
    from yivl.train.trainer import YiVLTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that a run needs except the weights."""

    arguments: Arguments
    plan: RunPlan
    args: "TrainingArguments"
    start: "Start"
    encoder: "Encoder"
    batches: "Batches"
    eval_loader: "BatchLoader | None"
    bad_rows: "BadRows"
    checkpoint: Path | None
    """To resume from."""
    total_steps: int


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, prepare the run, then describe it (``--dry_run``) or train and save the model."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    plan = RunPlan.of(arguments)
    command_line.log_to_stderr()
    run = prepare(arguments, plan)
    if is_complete(run):
        return
    model, sizes = build_model(run)
    if arguments.training.dry_run:
        describe(run, model.config, sizes)
    else:
        save(run, *fit(run, model))
    if run.args.should_log and (report := run.bad_rows.report()):
        logger.warning("%s", report)


def prepare(arguments: Arguments, plan: RunPlan) -> Run:
    """Set up the process, and read the checkpoint's small files and the data, so that errors show before weights load.

    Raises:
        YiVLError: If the checkpoint, the data or the output folder cannot be used.
    """
    import torch
    from transformers import set_seed

    from yivl.data.bad_rows import BadRows
    from yivl.data.encoding import Encoder
    from yivl.train.dataloaders import make_batches, make_eval_loader
    from yivl.train.initialization import read_start
    from yivl.train.resume import find_checkpoint

    model, data, training = arguments
    prepare_environment(training)
    args = trainer_arguments(arguments, plan)
    if args.process_index:
        logging.getLogger().setLevel(logging.ERROR)
    set_seed(training.seed)
    if training.deepspeed:
        import deepspeed

        # Before the model is built: ZeRO-3 partitions its weights as they are created.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")

    checkpoint = None if training.dry_run else find_checkpoint(training.output_dir, training.resume)
    with args.main_process_first(desc="reading the checkpoint folder"):
        start = read_start(model)
    num_patches = (start.image_size // start.config.vision_config.patch_size) ** 2
    num_patches += start.config.mm_vision_select_feature == "cls_patch"
    encoder = Encoder(start.tokenizer, start.image_processor, num_patches, data.model_max_length)
    # A dry run writes nothing to the output folder, and a new run does not count the bad rows of an earlier one.
    folder = Path(tempfile.gettempdir(), f"yivl-dry-run-{os.getpid()}") if training.dry_run else Path(args.output_dir)
    bad_rows = BadRows(data.on_bad_row, folder / "bad_rows.jsonl")
    if checkpoint is None and args.should_log:
        bad_rows.path.unlink(missing_ok=True)
    batches = make_batches(data, args, encoder, bad_rows)
    eval_loader = make_eval_loader(data, args, encoder, bad_rows)
    logger.info("%s", batches.mix)
    total_steps = plan.total_steps(training, len(batches.loader))
    return Run(arguments, plan, args, start, encoder, batches, eval_loader, bad_rows, checkpoint, total_steps)


def is_complete(run: Run) -> bool:
    """Return whether the run to resume has nothing left to do.

    Raises:
        CheckpointError: If the flags are those of another run.
    """
    from yivl.train.resume import check_same_run, is_finished

    if run.checkpoint is None:
        return False
    if is_finished(run.checkpoint, run.args.output_dir, run.total_steps):
        return True
    check_same_run(run.checkpoint, as_dict(run.arguments, run.args), run.total_steps)
    return False


def build_model(run: Run) -> "tuple[Any, list[PartSize]]":
    """Return the model with its trainable parameters selected, on the meta device for a dry run, and their numbers.

    Raises:
        YiVLError: If weights are missing or do not fit, or no parameter is trainable.
    """
    import torch

    from yivl.train import parameters
    from yivl.train.initialization import empty_start, load_start

    model_arguments, data, training = run.arguments
    model: Any
    if training.dry_run:
        model = empty_start(run.start)
    else:
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        model = load_start(run.start, model_arguments, dtype=dtype, packing=data.packing)
    num_vision_layers = model.config.num_vision_layers
    if model_arguments.lora_enable:
        model = parameters.add_adapters(model, model_arguments, base=os.path.abspath(run.start.folder))
    parameters.select_trainable(model, model_arguments, num_vision_layers)
    sizes = parameters.part_sizes(model, training)
    logger.info("%s", parameters.parameter_table(sizes))
    if not any(size.trainable for size in sizes):
        raise YiVLError("no parameter is trainable: the flags freeze every part of the model; drop one of them")
    if not training.deepspeed:
        parameters.upcast_trainable_params(model)
    parameters.enable_gradient_checkpointing(
        model,
        language_model=training.gradient_checkpointing,
        vision_tower=training.vision_gradient_checkpointing,
    )
    return model, sizes


def describe(run: Run, config: "YiVLConfig", sizes: "Sequence[PartSize]") -> None:
    """Log the steps and the estimated memory of a run."""
    from yivl.train.dry_run import describe_run

    batches = run.batches.loader
    logger.info("%s", describe_run(run.arguments, run.plan, batches, run.total_steps, config, sizes))


def fit(run: Run, model: "nn.Module") -> "tuple[YiVLTrainer, dict[str, float]]":
    """Train the model, and return the trainer and its metrics."""
    from yivl.train.resume import finished_checkpoints
    from yivl.train.trainer import YiVLTrainer

    training = run.arguments.training
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
        step, newest = trainer.state.global_step, finished_checkpoints(training.output_dir)[-1:]
        where = f"--resume auto continues from {newest[0].name}" if newest else "there is no checkpoint to resume from"
        logger.info("interrupted at step %d; %s", step, where)
        raise
    return trainer, result.metrics


def save(run: Run, trainer: "YiVLTrainer", metrics: dict[str, float]) -> None:
    """Write the metrics and the trained model to the output folder."""
    trainer.save_metrics("train", metrics)
    trainer.save_final()
    speed = metrics["train_samples_per_second"]
    logger.info("train_samples_per_second %s; the model is in %s", speed, run.args.output_dir)


def _leave() -> None:
    """End a rank at once, after the last of them is done.

    The threads that DeepSpeed and gloo leave behind can abort a finished process on its way out ("terminate called
    without an active exception"), and a run that wrote its model would count as failed.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    command_line.run(
        main,
        less_memory="--dry_run estimates what is needed; try a smaller --per_device_train_batch_size, "
        "--gradient_checkpointing True, --vision_gradient_checkpointing True, LoRA, or --deepspeed scripts/zero3.json",
    )
    _leave()
