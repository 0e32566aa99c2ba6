"""Flags of LLaVA, InternVL and transformers that are refused, or accepted with one value only, each with the reason."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

Check = Callable[[Any], str | None]
"""Returns why a value is refused, or ``None``."""

# What each flag of LLaVA may be, in lower case, and why it may be nothing else.
# Source of the names: haotian-liu/LLaVA, llava/train/train.py (1.5).
_LLAVA: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "version": (("mm_default",), "Yi-VL has one prompt, mm_default"),
    "conv_mode": (("mm_default",), "Yi-VL has one prompt, mm_default"),
    "mm_use_im_start_end": (("false",), "Yi-VL has no tokens around an image"),
    "mm_use_im_patch_token": (("false",), "Yi-VL has no image patch token"),
    "lazy_preprocess": (("true",), "samples are encoded when they are needed"),
    "is_multimodal": (("true",), "each sample may have an image"),
    "image_grid_pinpoints": ((), "an image is one square, without tiles"),
    "double_quant": (("true",), "--bits 4 always quantizes its constants too"),
    "quant_type": (("nf4",), "--bits 4 is nf4"),
    "lora_weight_path": (("",), "use --resume, or merge the adapter with scripts/merge_lora.sh and train the result"),
    "lora_bias": (("none",), "biases are not trained"),
    "mpt_attn_impl": ((), "the language model is no MPT; use --attn_implementation"),
    "cache_dir": ((), "set the environment variable HF_HUB_CACHE"),
    # Flags of older versions of transformers, which scripts of LLaVA also use.
    "overwrite_output_dir": (("false",), "give another --output_dir, or --resume auto"),
    "save_safetensors": (("true",), "weights are written in safetensors"),
    "logging_dir": ((), "logs are written to --output_dir"),
}

# The same of InternVL. Its --freeze_backbone, the ViT, is a flag of LLaVA, too, and means the language model there.
# Source of the names: OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py.
_INTERNVL: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "llm_path": ((), "use --model_name_or_path"),
    "vision_path": ((), "use --vision_tower"),
    "mlp_path": ((), "use --pretrain_mm_mlp_adapter"),
    "meta_path": ((), "use --data_path"),
    "freeze_llm": ((), "use --freeze_backbone, which freezes the language model here and not the ViT"),
    "freeze_mlp": ((), "use --freeze_mm_mlp_adapter"),
    "use_llm_lora": ((), "use --lora_enable, --lora_r, --lora_alpha and --lora_dropout"),
    "use_backbone_lora": ((), "use --lora_enable and --lora_vision_tower"),
    "max_seq_length": ((), "use --model_max_length"),
    "force_image_size": ((), "use --image_size"),
    "vision_select_layer": ((), "use --mm_vision_select_layer, for a new model"),
    "grad_checkpoint": ((), "use --gradient_checkpointing and --vision_gradient_checkpointing"),
    "pad2square": (("false",), "use --image_aspect_ratio pad"),
    "conv_style": (("hermes-2",), "the prompt is that of the checkpoint"),
    "down_sample_ratio": (("0.5",), "it is that of the checkpoint"),
    "dynamic_image_size": (("false",), "an image is one square, without tiles"),
    "min_dynamic_patch": (("1",), "an image is one square, without tiles"),
    "max_dynamic_patch": (("1",), "an image is one square, without tiles"),
    "use_thumbnail": (("false",), "an image is one square, without tiles"),
    "unfreeze_lm_head": ((), "the output head is trained with the language model"),
    "unfreeze_vit_layers": (("0",), "the ViT is trained whole, by --unfreeze_mm_vision_tower"),
    "use_data_resampling": (("false",), "set the weight of each source in a mixture"),
    "use_fast_tokenizer": (("false",), "texts become the ids of SentencePiece"),
    "normalize_type": (("imagenet",), "pixels are normalized as preprocessor_config.json says"),
}

# Flags of transformers that would have no effect or a wrong one here, and what to use instead.
_TRANSFORMERS: Final[Mapping[str, str]] = {
    "activation_checkpointing": "use --gradient_checkpointing and --vision_gradient_checkpointing",
    "resume_from_checkpoint": "use --resume",
    "dataloader_drop_last": "all samples are used",
    "auto_find_batch_size": "use --dry_run to see what fits",
    "load_best_model_at_end": "checkpoints stay in --output_dir",
    "metric_for_best_model": "compare the evaluation losses in log.jsonl",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
    "save_on_each_node": "all nodes share --output_dir",
    "ignore_data_skip": "a resumed run continues with the next batch",
    "label_smoothing_factor": "it needs the logits of the whole sequence",
    "remove_unused_columns": "rows are encoded whole",
    "label_names": "the labels are those of the conversations",
    "data_seed": "use --seed",
    "push_to_hub": "upload the finished folder with scripts/hub.py",
}


def llava_checks() -> dict[str, Check]:
    """Return the checks of flags that exist only to be refused, or to be accepted with the value that is always so."""
    return {name: partial(_check_only, *row) for name, row in _LLAVA.items()}


def internvl_checks() -> dict[str, Check]:
    """Return those of InternVL."""
    return {name: partial(_check_only, *row) for name, row in _INTERNVL.items()}


def transformers_checks() -> dict[str, Check]:
    """Return the checks of flags of transformers; those of ``HIDDEN`` accept no value but false."""
    return {name: partial(_check_off, reason) for name, reason in _TRANSFORMERS.items()} | {
        "average_tokens_across_devices": lambda on: None if on else "the loss is the mean over the tokens of a step",
        "save_strategy": lambda value: "compare the evaluation losses in log.jsonl" if value == "best" else None,
        "train_sampling_strategy": lambda value: None if value == "random" else "use --group_by_length",
        "report_to": _check_report,
    }


HIDDEN: Final = frozenset(_TRANSFORMERS)
"""Flags of transformers that ``--help`` leaves out."""


def _check_only(accepted: tuple[str, ...], reason: str, text: str) -> str | None:
    return None if text.lower() in accepted else reason


def _check_off(reason: str, value: Any) -> str | None:
    return reason if value else None


def _check_report(value: str) -> str | None:
    if "wandb" in value and importlib.util.find_spec("wandb") is None:
        return f"it needs a package, {sys.executable} -m pip install wandb"
    return None
