"""The dry run: steps, batch size and estimated memory of a run, before weights load."""

from collections.abc import Sequence
from dataclasses import replace

from yivl.data.rows import RowError
from yivl.model.configuration import YiVLConfig
from yivl.train.dataloaders import unwrap_worker_error
from yivl.train.memory import estimate_memory
from yivl.train.parameters import PartSize
from yivl.train.run import Run
from yivl.train.trainer import count_batch


def describe_run(run: Run, config: YiVLConfig, sizes: Sequence[PartSize]) -> str:
    """Return a text on the steps, the first batch and the memory of one GPU, on this machine and on larger ones.

    Raises:
        RowError: If a sample of the first batch cannot be used.
    """
    plan, micro_batch = run.plan, run.plan.per_device_train_batch_size
    arguments = run.arguments._replace(
        training=replace(run.arguments.training, per_device_train_batch_size=micro_batch)
    )
    accumulation, sequence_length = plan.gradient_accumulation_steps, run.arguments.data.model_max_length
    batches_per_step = accumulation * plan.world_size
    try:
        first = next(iter(run.batches.loader))
    except RowError as error:
        raise unwrap_worker_error(error) from error
    samples, tokens = count_batch(first, config.num_patches)
    lines = [
        f"{run.total_steps:,} steps, global batch size {micro_batch * batches_per_step:,} ({micro_batch} per device x "
        f"{accumulation} accumulation steps x {plan.world_size} processes)",
        f"first batch: {samples:,} samples, {tokens:,} tokens; about {tokens * batches_per_step:,} tokens per step",
        f"estimated memory per GPU, sequence length {sequence_length:,}, {plan.zero}:",
    ]
    for num_gpus in sorted({plan.world_size, 1, 8, 64} if plan.zero.stage else {plan.world_size}):
        lines.append(f"{num_gpus:>5} GPUs  {estimate_memory(sizes, config, arguments, plan.zero, num_gpus)}")
    return "\n".join(lines)
