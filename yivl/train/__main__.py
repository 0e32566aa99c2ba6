"""Train Yi-VL: the published stages, full fine-tuning, LoRA and QLoRA.

python -m yivl.train --model_name_or_path CHECKPOINT --data_path rows.json --image_folder images --output_dir out

The scripts of ``scripts/`` call this with the flags of each case; docs/training.md explains them.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from yivl import command_line
from yivl.errors import Stopped
from yivl.train.arguments import parse_arguments
from yivl.train.cpu_threads import let_idle_threads_sleep
from yivl.train.plan import RunPlan, prepare_environment

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, prepare the run, then describe it (``--dry_run``) or train and save the model."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    plan = RunPlan.of(arguments)

    # PyTorch and transformers take seconds to import; wrong flags are reported before.
    let_idle_threads_sleep()
    prepare_environment(arguments.training)
    command_line.log_to_stderr()
    from yivl.checkpoint.full_disk import explain_full_disk
    from yivl.train.dry_run import describe_run
    from yivl.train.nodes import reporting_lost_connections
    from yivl.train.resume import describe_resume
    from yivl.train.run import build_model, fit, prepare, save

    with ExitStack() as resources, reporting_lost_connections():
        run = prepare(arguments, plan, resources)
        if run.is_finished:
            step = run.total_steps
            logger.info("this run is finished (%d of %d steps); the model is in %s", step, step, run.args.output_dir)
            return
        model, sizes = build_model(run)
        if arguments.training.dry_run:
            logger.info("%s", describe_run(run, model.config, sizes))
        else:
            output_dir = run.args.output_dir
            with explain_full_disk(output_dir, lambda: describe_resume(output_dir)):
                save(run, *fit(run, model))
        if run.args.should_log and (report := run.bad_rows.report()):
            logger.warning("%s", report)


def _run() -> None:
    try:
        main()
    except Stopped:  # other errors may end one rank alone, and the others would wait for it
        _shut_down()
        raise
    _shut_down()


def _shut_down() -> None:
    if "torch" not in sys.modules:  # --help
        return
    from yivl.train.nodes import reporting_lost_connections
    from yivl.train.ranks import leave_group

    with reporting_lost_connections():
        leave_group()


if __name__ == "__main__":
    command_line.run(
        _run,
        less_memory="--dry_run estimates what is needed; try a smaller --per_device_train_batch_size, "
        "--gradient_checkpointing True, --vision_gradient_checkpointing True, LoRA, or --deepspeed scripts/zero3.json",
    )
