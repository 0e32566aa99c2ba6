"""Train Yi-VL: the published stages, full fine-tuning, LoRA and QLoRA.

python -m yivl.train --model_name_or_path CHECKPOINT --data_path rows.json --image_folder images --output_dir out

The scripts of ``scripts/`` call this with the flags of each case; docs/training.md explains them.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yivl import command_line

if TYPE_CHECKING:
    from yivl.data.bad_rows import BadRows

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Arguments, data, model, training, the trained model: in this order, so that mistakes show before weights load."""
    command_line.log_to_stderr()

    from yivl.train.arguments import parse_arguments, prepare_environment

    argv = sys.argv[1:] if argv is None else argv
    prepare_environment(argv)
    arguments = parse_arguments(argv)
    model_arguments, data, training = arguments

    import torch
    from transformers import set_seed

    from yivl.data.bad_rows import BadRows
    from yivl.data.encoding import Encoder
    from yivl.errors import YiVLError
    from yivl.train import parameters
    from yivl.train.dataloaders import make_batches, make_eval_loader
    from yivl.train.dry_run import describe_run, total_steps
    from yivl.train.initialization import empty_start, load_start, read_start
    from yivl.train.resume import describe_origin, find_checkpoint, finished_checkpoints, is_finished
    from yivl.train.trainer import YiVLTrainer

    if training.process_index:
        logging.getLogger().setLevel(logging.ERROR)
    set_seed(training.seed)
    if training.deepspeed:
        import deepspeed

        # Before the model is built: ZeRO-3 spreads its weights over the processes as they are made.
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")

    checkpoint = None if training.dry_run else find_checkpoint(training.output_dir, training.resume)
    with training.main_process_first(desc="reading the checkpoint folder"):
        start = read_start(model_arguments)
    num_patches = (start.image_size // start.config.vision_config.patch_size) ** 2
    num_patches += start.config.mm_vision_select_feature == "cls_patch"
    encoder = Encoder(start.tokenizer, start.image_processor, num_patches, data.model_max_length)
    # A dry run writes nothing into the output folder, and a new run does not count the bad rows of another.
    folder = (
        Path(tempfile.gettempdir(), f"yivl-dry-run-{os.getpid()}") if training.dry_run else Path(training.output_dir)
    )
    bad_rows = BadRows(data.on_bad_row, folder / "bad_rows.jsonl")
    if checkpoint is None and training.should_log:
        bad_rows.path.unlink(missing_ok=True)
    batches = make_batches(data, training, encoder, bad_rows)
    eval_loader = make_eval_loader(data, training, encoder, bad_rows)
    logger.info("%s", batches.mix)
    if checkpoint is not None and is_finished(checkpoint, arguments, total_steps(arguments, batches)):
        return
    if checkpoint is not None:
        batches.check_record(checkpoint)

    if training.dry_run:
        model = empty_start(start)
    else:
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        model = load_start(start, model_arguments, dtype=dtype, packing=data.packing)
    config = model.config
    if model_arguments.lora_enable:
        model = parameters.add_adapters(model, model_arguments, base=os.path.abspath(start.folder))
    parameters.select_trainable(model, model_arguments, config.num_vision_layers)
    sizes = parameters.part_sizes(model, training)
    logger.info("%s", parameters.parameter_table(sizes))
    if training.dry_run:
        logger.info("%s", describe_run(arguments, batches, config, sizes))
        _report(bad_rows)
        return
    if not any(size.trainable for size in sizes):
        raise YiVLError("nothing would train: every part of the model is frozen by the flags")
    if not training.deepspeed:
        parameters.keep_masters(model)
    parameters.recompute_layers(
        model,
        language_model=bool(training.recompute_language_model),
        vision_tower=training.vision_gradient_checkpointing,
    )
    trainer = YiVLTrainer(
        model,
        arguments,
        batches.loader,
        tokenizer=start.tokenizer,
        image_processor=start.image_processor,
        num_patches=num_patches,
        eval_loader=eval_loader,
        record=describe_origin(model_arguments.model_name_or_path, batches.sources),
    )
    if training.resume:
        logger.info("going on from %s", checkpoint or "the beginning: there is no checkpoint yet")
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        newest = [path.name for path in finished_checkpoints(training.output_dir)][-1:]
        logger.info(
            "stopped at step %d; go on %s",
            trainer.state.global_step,
            f"from {newest[0]} with --resume auto" if newest else "from the beginning: there is no checkpoint yet",
        )
        raise
    trainer.save_metrics("train", result.metrics)
    trainer.save_final()
    logger.info(
        "train_samples_per_second %s; the model is in %s",
        result.metrics["train_samples_per_second"],
        training.output_dir,
    )
    if training.should_log:
        _report(bad_rows)


def _report(bad_rows: "BadRows") -> None:
    """Say how many rows were left out, if any were."""
    if text := bad_rows.report():
        logger.warning("%s", text)


def _leave() -> None:
    """End a process of several at once, after the last of them is done.

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
