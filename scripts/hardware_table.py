"""Print the tables of GPUs and training modes in docs/training.md and docs/internvl.md: estimates of the dry run.

python scripts/hardware_table.py
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "tests/golden/yi-vl-34b"
# Source: 01-ai/Yi-VL-6B, config.json; the other fields are those of the 34B.
FIELDS_6B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
# Sources: OpenGVLab/InternVL-Chat-V1-2 and InternViT-6B-448px-V1-2, config.json; the vocabulary is inferred, 64,000 and
# the nine tokens that training adds.
INTERNVL = {
    "vocab_size": 64_009,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
INTERNVIT = {"image_size": 448, "num_hidden_layers": 45}
LANGUAGE_MODEL = "--gradient_checkpointing True"
BOTH = f"{LANGUAGE_MODEL} --vision_gradient_checkpointing True"
MODES = {
    "stage 1 (224), captions, 8 samples": f"--stage 1 --model_max_length 512 --per_device_train_batch_size 8 {BOTH}",
    "stage 2 (448), captions, 8 samples": f"--stage 2 --model_max_length 1280 --per_device_train_batch_size 8 {BOTH}",
    "stage 3, 1 sample": f"--stage 3 {BOTH}",
    "full, ViT and projector frozen, 1 sample": f"--freeze_mm_mlp_adapter True {LANGUAGE_MODEL}",
    "LoRA, 1 sample": f"--lora_enable True --freeze_mm_mlp_adapter True {LANGUAGE_MODEL}",
    "QLoRA, 1 sample": f"--bits 4 --lora_enable True --freeze_mm_mlp_adapter True {LANGUAGE_MODEL}",
}
RECIPES = {
    "pretrain_v1_2.yaml, captions": "pretrain_v1_2.yaml --model_max_length 512",
    "finetune_v1_2.yaml": "finetune_v1_2.yaml",
    "finetune_v1_2_again.yaml": "finetune_v1_2_again.yaml",
    "finetune_v1_2_lora.yaml": "finetune_v1_2_lora.yaml",
}
"""Files of ``configs/internvl``, and flags."""
# Number of GPUs, and GiB of each that are left by the CUDA context and fragmentation.
MACHINES = {"1 × 24 GB": (1, 21.5), "1 × 80 GB": (1, 76.0), "8 × 80 GB": (8, 76.0)}
INTERNVL_MACHINES = {f"{number} × 80 GB": (number, 76.0) for number in (2, 8, 16, 64)}


def main() -> None:
    """Print the tables."""
    print(table(), internvl_table(), sep="\n\n")


def table() -> str:
    """Return the Markdown table of Yi-VL; a cell holds the simplest setting that fits, and its estimate."""
    lines = [f"| mode | model | {' | '.join(MACHINES)} |", f"|---|---|{'---|' * len(MACHINES)}"]
    for mode, flags in MODES.items():
        for name, fields in (("6B", FIELDS_6B), ("34B", {})):
            cells = [fitting(describe(flags, fields), *machine) for machine in MACHINES.values()]
            lines.append(f"| {mode} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def internvl_table() -> str:
    """Return that of the recipes of InternVL-Chat-V1-2, with their micro-batch and with one sample.

    There is no cell for GPUs whose batches are no part of the global batch of the recipe.
    """
    lines = [f"| recipe | samples | {' | '.join(INTERNVL_MACHINES)} |"]
    lines.append(f"|---|---|{'---|' * len(INTERNVL_MACHINES)}")
    for recipe, flags in RECIPES.items():
        published = describe_internvl(f"--config {ROOT}/configs/internvl/{flags}")
        training = published.arguments.training
        for samples in (training.per_device_train_batch_size, 1):
            arguments = published.arguments._replace(training=replace(training, per_device_train_batch_size=samples))
            run = replace(published, arguments=arguments)
            cells = [
                "–" if training.global_batch_size % (samples * number) else fitting(run, number, room)
                for number, room in INTERNVL_MACHINES.values()
            ]
            lines.append(f"| {recipe} | {samples} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Described:
    """A run without its data and weights."""

    arguments: Any
    config: Any
    sizes: list[Any]
    """The ``PartSize`` of each part."""

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return sum(size.parameters for size in self.sizes)

    @property
    def trainable(self) -> int:
        """The trainable ones."""
        return sum(size.trainable for size in self.sizes)

    def part(self, name: str) -> int:
        """Return the parameters of a part."""
        return next(size.parameters for size in self.sizes if size.name == name)

    def memory(self, zero: Any, num_gpus: int) -> Any:
        """Return the estimated ``Memory`` of one GPU."""
        from yivl.train.memory import estimate_memory

        return estimate_memory(self.sizes, self.config, self.arguments, zero, num_gpus)


def describe(flags: str, fields: dict[str, Any], vision_fields: dict[str, Any] | None = None) -> Described:
    """Return the run of flags, on the 34B with other ``fields`` of its configuration and of that of its ViT."""
    from transformers import CLIPVisionConfig

    from yivl.model.configuration import YiVLConfig

    vision = json.loads(next(PUBLISHED.glob("vit/*/config.json")).read_text())
    published = json.loads((PUBLISHED / "config.json").read_text()) | fields
    published.pop("model_type")
    arguments = _parse(flags)
    vision |= {"image_size": arguments.model.image_size or 448} | (vision_fields or {})
    return _described(arguments, YiVLConfig(**published, vision_config=CLIPVisionConfig(**vision)))


def describe_internvl(
    flags: str, fields: dict[str, Any] | None = None, vision_fields: dict[str, Any] | None = None
) -> Described:
    """Return the run of flags, on InternVL-Chat-V1-2 with other ``fields`` of the LLM and of the ViT."""
    from yivl.model.internvl_configuration import InternVisionConfig, InternVLConfig

    vision = InternVisionConfig(**INTERNVIT | (vision_fields or {}))
    config = InternVLConfig(**INTERNVL | (fields or {}), mm_hidden_size=vision.hidden_size, vision_config=vision)
    return _described(_parse(flags), config)


def _parse(flags: str) -> Any:
    from yivl.train.arguments import parse_arguments

    return parse_arguments(f"--model_name_or_path m --data_path d --output_dir o --bf16 True {flags}".split())


def _described(arguments: Any, config: Any) -> Described:
    import torch

    from yivl.model.architectures import model_class
    from yivl.train import parameters

    with torch.device("meta"):
        model: Any = model_class(config)(config)
        if arguments.model.lora_enable:
            model = parameters.add_adapters(model, arguments.model, base="m")
    parameters.select_trainable(model, arguments.model, config.num_vision_layers)
    return Described(arguments, config, parameters.part_sizes(model, arguments.training))


def fitting(run: Described, num_gpus: int, room: float) -> str:
    """Return the simplest DeepSpeed setting that fits on ``num_gpus`` GPUs, and the memory of one."""
    from yivl.train.memory import GIB
    from yivl.train.plan import Zero

    settings = {"no DeepSpeed": Zero()}
    if run.arguments.model.bits == 16:
        settings |= {
            "zero2": Zero(2),
            "zero3": Zero(3),
            "zero2_offload": Zero(2, offloads_optimizer=True),
            "zero3_offload": Zero(3, offloads_optimizer=True, offloads_weights=True),
        }
    for name, zero in settings.items():
        needed = run.memory(zero, num_gpus).total / GIB
        if needed <= room:
            return f"{name}, {needed:.0f} GiB"
    return "–"


if __name__ == "__main__":
    main()
