"""Configuration files of ``llamafactory-cli train``: the published recipes for Yi-VL-6B-hf with a given dataset.

Source: Deep-Spark/DeepSparkHub, models/nlp/llm/yi-vl-6b/pytorch, yi_vl_6b_full_sft.yaml and yi_vl_6b_lora_sft.yaml.
Different here: all samples are used; ``train_mm_proj_only``, which LLaMA-Factory no longer knows, is left out; LoRA has
the ``yi_vl`` template too, not that of LLaVA; no code of the model folder runs; an earlier run is not overwritten.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, Final

import yaml

from yivl.checkpoint.atomic import write_text

logger = logging.getLogger(__name__)

_DEEPSPEED: Final = "zero3.json"
_SHARED: Final[dict[str, Any]] = {
    "stage": "sft",
    "do_train": True,
    "template": "yi_vl",
    "cutoff_len": 2048,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180_000_000,  # seconds
    "val_size": 0.01,
}
_RECIPES: Final[dict[str, dict[str, Any]]] = {
    "full": {
        "finetuning_type": "full",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-5,
        "num_train_epochs": 10.0,
    },
    "lora": {
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
    },
}


def write_recipes(
    folder: Path, *, name: str, model: str, deepspeed: Path, image_folder: Path | None = None
) -> tuple[Path, ...]:
    """Write ``<name>_full.yaml`` and ``<name>_lora.yaml`` beside a dataset, for LLaMA-Factory 0.9.5.

    Args:
        folder: The ``dataset_dir`` that declares the dataset.
        name: Of the dataset.
        model: ``-hf`` folder or hub id.
        deepspeed: ZeRO-3 configuration of full fine-tuning, copied to ``folder``.
        image_folder: Start of relative image paths; by default ``folder``.

    Returns:
        The files that have these values. One with others is kept and reported.
    """
    place = folder.resolve()
    if not (folder / _DEEPSPEED).exists():
        shutil.copyfile(deepspeed, folder / _DEEPSPEED)
    paths = []
    for kind, recipe in _RECIPES.items():
        fields = {
            "model_name_or_path": str(Path(model).resolve()) if Path(model).exists() else model,
            **_SHARED,
            **recipe,
            "dataset": name,
            "dataset_dir": str(place),
            "media_dir": str(place if image_folder is None else image_folder.resolve()),
            "output_dir": f"saves/{name}/{kind}",
        }
        if kind == "full":
            fields["deepspeed"] = str(place / _DEEPSPEED)
        path, text = folder / f"{name}_{kind}.yaml", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            logger.warning("%s: kept; delete it for new settings", path)
            continue
        write_text(path, text)
        paths.append(path)
    return tuple(paths)
