"""Parts of the GPU report about training steps of the 6B shape with random weights.

python scripts/gpu_report_training.py --part lora

The steps are those of the trainer of ``python -m yivl.train`` with the flags of each part, on samples in memory: an
image, 60 prompt tokens and an answer, all of one length; every micro-batch is an optimizer step.
"""

import os
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmark_inference import machine_rates, peak_bytes
from benchmark_training import make_image_processor, random_examples
from flops import Trained, peak_rate, training_flops, utilization
from gpu_report_parts import Figures, Part, SkippedError, free_memory, one_line, require_packages, run_part
from gpu_report_training_parts import RUNS, Size, TrainingRun
from hardware_table import FIELDS_6B, Described, describe
from random_models import random_weights

from yivl import command_line
from yivl.train.cpu_threads import let_idle_threads_sleep

GIB: Final = 2**30
WARM_UP: Final = 2
"""Steps that are left out: the first allocates the optimizer states."""
STEPS: Final = 8
"""Measured steps."""
REHEARSAL_STEPS: Final = 1
RESERVED: Final = 3 * GIB
"""GPU memory that is left to the CUDA context and fragmentation. Source: ours."""
HOST_BYTES: Final = 16
"""CPU memory per trainable parameter of ZeRO offloading: FP32 master weight, gradient and two moments. Source:
ZeRO-Offload (arXiv 2101.06840), section 3, with gradients in float32."""
# A shape for the rehearsal: four bits need widths that are multiples of 64.
REHEARSAL: Final = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "mm_hidden_size": 64,
}
REHEARSAL_VIT: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
}


def measure(training: TrainingRun, figures: Figures) -> None:
    """Measure the first size that fits; figures are printed after every step and every size that does not fit.

    Raises:
        SkippedError: If a package is missing, or DeepSpeed would compile operators in a rehearsal.
        RuntimeError: If no size fits.
    """
    require_packages("peft", *training.packages)
    if "--deepspeed" in training.flags and figures.device == "cpu" and (notice := _compilation()):
        raise SkippedError(notice)
    reasons = []
    for size in training.sizes:
        run = described(training, size, figures)
        reason = reason_not_to_try(training, run, figures.device)
        if reason is None:
            try:
                train(training, run, figures)
                return
            except Exception as error:
                if not command_line.is_out_of_memory(error):
                    raise
                reason = one_line(error)
        reasons.append(f"{size.layers} layers, {size.micro_batch} samples {size.flags}".strip() + f": {reason}")
        figures.values = {"skipped": "; ".join(reasons)}
        figures.show()
        free_memory()
    raise RuntimeError("no size fits")


def _compilation() -> str | None:
    """Return a line on the operators that DeepSpeed would compile for minutes, which no rehearsal waits for."""
    from yivl.train.compilation import describe_compilation
    from yivl.train.plan import Zero

    return describe_compilation(Zero(2, offloads_optimizer=True))


def described(training: TrainingRun, size: Size, figures: Figures) -> Described:
    """Return the run of a size, without its weights."""
    micro_batch = 2 if figures.rehearsal else size.micro_batch
    flags = f"{training.flags} {size.flags} --per_device_train_batch_size {micro_batch}"
    flags += f" --global_batch_size {micro_batch} --learning_rate 1e-5 --save_strategy no --report_to none"
    flags += " --dataloader_num_workers 0 --disable_tqdm True"
    steps = REHEARSAL_STEPS if figures.rehearsal else STEPS
    flags += f" --max_steps {WARM_UP + steps}"
    if figures.device == "cuda":
        flags += " --tf32 True"
    if "--bits" in training.flags:
        flags += f" --optim {'paged_adamw_8bit' if figures.device == 'cuda' else 'adamw_bnb_8bit'}"
    if figures.rehearsal:
        run = describe(f"{flags} --image_size 56", REHEARSAL, REHEARSAL_VIT)
    else:
        run = describe(flags, FIELDS_6B | {"num_hidden_layers": size.layers})
    sample = random_examples(1, run.config, training.answer, training.answer)[0]
    data = replace(run.arguments.data, model_max_length=sample.sequence_length)
    return replace(run, arguments=run.arguments._replace(data=data))


def reason_not_to_try(training: TrainingRun, run: Described, device: str) -> str | None:
    """Return why a run does not fit by the estimate of the dry run, or ``None``."""
    import torch

    if device == "cpu":
        return None
    needed, free = estimated(run).total, torch.cuda.mem_get_info()[0] - RESERVED
    if needed > free:
        return f"estimated {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
    if "offload" in training.flags and Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        host, available = HOST_BYTES * run.trainable, int(lines["MemAvailable"].split()[0]) * 1024
        if host > available:
            return f"needs {host / GIB:.0f} GiB of CPU memory, {available / GIB:.0f} GiB are available"
    return None


def estimated(run: Described) -> Any:
    """Return the ``Memory`` that the dry run estimates for one GPU."""
    from yivl.train.plan import Zero

    return run.memory(Zero.read(run.arguments.training), 1)


def train(training: TrainingRun, run: Described, figures: Figures) -> None:
    """Train; figures of the steps after the warm-up are printed after every step."""
    import torch

    cuda, before = figures.device == "cuda", dict(figures.values)
    rate = machine_rates(torch.bfloat16, figures.device, 3, 512 if figures.rehearsal else 8192)[1]
    peak_flops = peak_rate(torch.cuda.get_device_name()) if cuda else None
    estimate = estimated(run).total

    def report() -> None:
        peak = peak_bytes(figures.device)
        figures.values = before | {
            "layers": run.config.num_hidden_layers,
            "samples_per_step": run.arguments.training.per_device_train_batch_size,
            "sequence_length": run.arguments.data.model_max_length,
            "parameters": run.parameters,
            "trainable": run.trainable,
            **speed(run, training.answer, times.seconds(), rate, peak_flops),
            "peak_allocated_bytes": peak,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else peak,
            "estimated_bytes": estimate,
            "estimate_over_peak": estimate / peak if cuda else None,  # a CPU's peak is that of the process
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        }
        figures.show()

    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make_trainer(training, run, figures, Path(folder), report)
        free_memory()
        trainer.train()
    report()  # with the last loss


def speed(
    run: Described, targets: int, steps: list[dict[str, float]], rate: float, peak: float | None
) -> dict[str, Any]:
    """Return the speed and utilization of measured steps.

    Args:
        run: With the micro-batch and the sequence length of all samples.
        targets: Tokens of a sample that the loss is computed on.
        steps: Seconds of each step, ``step`` and those of its phases.
        rate: Measured rate of matrix products in FLOP/s.
        peak: Rate in FLOP/s by the GPU's datasheet, if known.
    """
    model, samples = run.arguments.model, run.arguments.training.per_device_train_batch_size
    tokens = run.arguments.data.model_max_length
    trained = Trained(
        vision_tower=model.unfreeze_mm_vision_tower,
        projector=not model.freeze_mm_mlp_adapter,
        language_model=model.trains_language_model,
        lora_rank=model.lora_r if model.lora_enable else 0,
    )
    flops = samples * training_flops(run.config, tokens, targets, trained)
    seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    step = seconds.pop("step")
    return {
        "steps": len(steps),
        "step_seconds": step,
        "phase_seconds": seconds,
        "samples_per_s": samples / step,
        "tokens_per_s": samples * tokens / step,
        "useful_flop_per_step": flops,
        "mfu": utilization(flops, step, peak),
        "share_of_matrix_products": utilization(flops, step, rate),
        "peak_flop_per_s": peak,
        "matrix_products_flop_per_s": rate,
    }


def make_trainer(
    training: TrainingRun, run: Described, figures: Figures, folder: Path, report: Callable[[], None]
) -> tuple[Any, Any]:
    """Return the trainer of a run with random weights and samples in memory, and the times that it will take."""
    import torch
    from gpu_report_steps import InMemoryBatches, StepTimes, quantize

    from yivl.train import parameters
    from yivl.train.plan import RunPlan, prepare_environment, trainer_arguments
    from yivl.train.trainer import YiVLTrainer

    flags = run.arguments._replace(training=replace(run.arguments.training, output_dir=str(folder)))
    prepare_environment(flags.training)
    plan = RunPlan.of(flags)
    args = trainer_arguments(flags, plan)
    if flags.training.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend="nccl" if figures.device == "cuda" else "gloo")
    run.config.use_cache = False
    torch.manual_seed(0)
    model = random_weights(run.config, "bfloat16", figures.device)
    if flags.model.bits == 4:
        quantize(model, figures.device)
    prepared, _ = parameters.set_up_model(model, flags, base="m")
    num_samples = plan.per_device_train_batch_size * flags.training.max_steps
    samples = random_examples(num_samples, run.config, training.answer, training.answer)
    trainer = YiVLTrainer(
        prepared,
        args,
        InMemoryBatches.of(samples, plan.per_device_train_batch_size),
        arguments=flags,
        encoder=Namespace(image_processor=make_image_processor(), num_patches=run.config.num_patches),
        offloads_optimizer=plan.zero.offloads_optimizer,
    )
    trainer.remove_callback(trainer.run_log)  # draws with matplotlib
    limit = 0.2 * figures.seconds_left
    synchronize = torch.cuda.synchronize if figures.device == "cuda" else None
    times = StepTimes(prepared, synchronize, WARM_UP, lambda: figures.seconds_left < limit, report)
    trainer.add_callback(times)
    return trainer, times


PARTS = tuple(Part(run.name, run.seconds, run.title, partial(measure, run)) for run in RUNS)

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    let_idle_threads_sleep()  # as training does
    command_line.run(lambda: run_part(PARTS, __doc__))
