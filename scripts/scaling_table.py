"""Print the tables of docs/scaling.md: memory, communication, checkpoints and the time of the published stages.

python scripts/scaling_table.py

Formulas, not measurements: the memory is the estimate of the dry run, the other numbers follow from the published
configurations and the assumptions below.
"""

from dataclasses import dataclass
from typing import Final

from flops import PEAK_FLOPS, Trained, training_flops
from hardware_table import FIELDS_6B, MODES, Described, describe
from measure_communication import bytes_per_step

MODELS: Final = {"6B": FIELDS_6B, "34B": {}}
PEAK: Final = PEAK_FLOPS["A800"]
UTILIZATION: Final = 0.40
"""Assumed share of the peak, re-computation counted. It was not measured here."""
NUM_GPUS: Final = 128
"""Source: Yi-VL model card, "Training"."""
CARD_DAYS: Final = {"6B": 3, "34B": 10}
"""For all three stages. Source: Yi-VL model card, "Training"."""
# Bytes per second in one direction. Sources: A800 datasheet (NVLink 400 GB/s in both directions); line rates.
LINKS: Final = {
    "NVLink": 200e9,
    "InfiniBand 400 Gb/s": 50e9,
    "InfiniBand 200 Gb/s": 25e9,
    "25 GbE": 25e9 / 8,
    "1 GbE": 1e9 / 8,
}
DISK: Final = 2e9
"""Assumed bytes per second of the shared file system, for one writer."""


@dataclass(frozen=True)
class Stage:
    """A published stage; the number of text tokens of a sample is an assumption."""

    mode: str
    samples: float
    text_tokens: int
    global_batch_size: int


# Sources: Yi-VL model card, "Training" (samples, global batch size); stage 3 has two epochs.
STAGES: Final = {
    "1": Stage("stage 1 (224), captions, 8 samples", 100e6, 40, 4096),
    "2": Stage("stage 2 (448), captions, 8 samples", 25e6, 40, 4096),
    "3": Stage("stage 3, 1 sample", 2e6, 200, 256),
}


def main() -> None:
    """Print the tables."""
    print(tables())


def tables() -> str:
    """Return the tables as Markdown, each below its title."""
    runs = {(stage, name): describe(MODES[STAGES[stage].mode], MODELS[name]) for name in MODELS for stage in STAGES}
    lora = {name: describe(MODES["LoRA, 1 sample"], fields) for name, fields in MODELS.items()}
    return "\n\n".join(
        [
            memory_table(runs, lora),
            communication_table(runs, lora),
            checkpoint_table(runs, lora),
            time_table(runs),
        ]
    )


def memory_table(runs: dict[tuple[str, str], Described], lora: dict[str, Described]) -> str:
    """Return the estimated GiB of one GPU, by strategy and number of GPUs."""
    from yivl.train.memory import GIB
    from yivl.train.plan import Zero

    columns = [("DDP", Zero(), 8)]
    for num_gpus in (8, NUM_GPUS):
        columns += [("ZeRO-2", Zero(2), num_gpus), ("ZeRO-3", Zero(3), num_gpus)]
        columns += [("FSDP2", Zero(3, is_fsdp=True), num_gpus)]
    names = [f"{name} × {num_gpus}" for name, _, num_gpus in columns]
    lines = [f"| GiB per GPU | model | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    rows = [(STAGES[stage].mode, name, run) for (stage, name), run in runs.items()]
    rows += [("LoRA, 1 sample", name, run) for name, run in lora.items()]
    for mode, name, run in sorted(rows, key=lambda row: row[0]):
        cells = [f"{run.memory(zero, num_gpus).total / GIB:.0f}" for _, zero, num_gpus in columns]
        lines.append(f"| {mode} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def communication_table(runs: dict[tuple[str, str], Described], lora: dict[str, Described]) -> str:
    """Return the GB that a GPU sends per step of one micro-batch, and the seconds that takes on each link."""
    lines = [f"| trained | model | strategy | GB | {' | '.join(LINKS)} |", f"|---|---|---|---|{'---|' * len(LINKS)}"]
    rows = [(f"stage {stage}", name, runs[stage, name]) for stage in ("1", "3") for name in MODELS]
    rows += [("LoRA", name, run) for name, run in lora.items()]
    for trained, name, run in rows:
        # Gradients are float32 under DDP (autocast) and FSDP2, and bfloat16 under DeepSpeed.
        for strategy, gradient_width in (("DDP", 4), ("ZeRO-2", 2), ("ZeRO-3", 2), ("FSDP2", 4)):
            sent = bytes_per_step(strategy, run.parameters, run.trainable, NUM_GPUS, 2, gradient_width)
            seconds = [number(sent / speed) for speed in LINKS.values()]
            lines.append(f"| {trained} | {name} | {strategy} | {number(sent / 1e9)} | {' | '.join(seconds)} |")
    return "\n".join(lines)


def checkpoint_table(runs: dict[tuple[str, str], Described], lora: dict[str, Described]) -> str:
    """Return the GB of a checkpoint, and the seconds to write them."""
    lines = ["| trained | model | final model | weights | optimizer | one writer | DeepSpeed, of which per rank |"]
    lines.append("|---|---|---|---|---|---|---|")
    for trained, name, run in [("all, stage 3", name, runs["3", name]) for name in MODELS] + [
        ("LoRA", name, run) for name, run in lora.items()
    ]:
        # The ViT is written twice, in the main files and in vit/. FP32 master weights and two moments.
        vit = 0 if trained == "LoRA" else run.part("vision_tower")
        written = run.trainable if trained == "LoRA" else run.parameters
        weights, optimizer = 4 * run.trainable + 2 * (written - run.trainable) + 4 * vit, 8 * run.trainable
        final = (4 if trained == "LoRA" else 2) * (written + vit)
        states = 12 * run.trainable
        # DeepSpeed writes its weights in 16 bits in addition to those of the published format.
        deepspeed = 2 * (written + vit) + 2 * written + states
        cells = [f"{number(size / 1e9)} GB" for size in (final, weights, optimizer)]
        cells.append(f"{number((weights + optimizer) / DISK)} s")
        cells.append(f"{number(deepspeed / 1e9)} GB, {number(states / NUM_GPUS / 1e9)} GB")
        lines.append(f"| {trained} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(runs: dict[tuple[str, str], Described]) -> str:
    """Return FLOP per sample, the time of a step and of a stage, and the utilization that the model card implies."""
    lines = ["| stage | model | tokens per sample | TFLOP per sample | samples per step | s per step | steps | days |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    totals = []
    for name in MODELS:
        days = 0.0
        for stage, published in STAGES.items():
            run, count = runs[stage, name], published.samples
            tokens = run.config.num_patches + published.text_tokens
            trained = Trained(vision_tower=True, projector=True, language_model=stage == "3")
            # As `torch.utils.flop_counter` counts. The logits are those of the text.
            flop = training_flops(run.config, tokens, published.text_tokens, trained, causal=False, recomputes=True)
            step = flop * published.global_batch_size / (NUM_GPUS * PEAK * UTILIZATION)
            steps = count / published.global_batch_size
            days += step * steps / 86_400
            cells = [f"{tokens:,}", number(flop / 1e12), f"{published.global_batch_size:,}", number(step)]
            lines.append(
                f"| {stage} | {name} | {' | '.join([*cells, f'{steps:,.0f}', number(step * steps / 86_400)])} |"
            )
        share = UTILIZATION * days / CARD_DAYS[name]
        totals.append(f"| {name} | {number(days)} | {CARD_DAYS[name]} | {100 * share:.0f} % |")
    summary = [f"| model | days at {100 * UTILIZATION:.0f} % | days of the model card | utilization that implies |"]
    return "\n".join([*lines, "", *summary, "|---|---|---|---|", *totals])


def number(value: float) -> str:
    """Return a number with two significant digits, or whole."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2g}"


if __name__ == "__main__":
    main()
