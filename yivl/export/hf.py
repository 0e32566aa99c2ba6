"""Conversion between Yi-VL checkpoints and the ``-hf`` format of Yi-VL-6B-hf, in both directions and without loss.

``yivl.checkpoint.hf_format`` describes the format and reads it.
"""

import os
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import HF, format_of, read_config, read_processors
from yivl.checkpoint.format import check_keys
from yivl.checkpoint.hf_format import (
    PUBLISHED,
    STRATEGIES,
    VOCABULARY,
    load_hf_clip_processor,
    load_hf_tokenizer,
    read_hf_config,
    read_hf_generation_config,
    read_hf_weights,
    read_published,
    to_hf_key,
)
from yivl.checkpoint.loading import empty_model
from yivl.checkpoint.saving import check_apart, checkpoint_dir, save_checkpoint
from yivl.constants import LLAVA_IMAGE_TOKEN, STOP_STRING
from yivl.errors import CheckpointError
from yivl.export.llava import (
    Checkpoint,
    read_checkpoint,
    text_config,
    vision_config,
    write_processor,
    write_tokenizer,
)
from yivl.model.configuration import YiVLConfig
from yivl.tokenization import tokenize

PAD_TOKEN: Final = "<pad>"
"""The second id after the vocabulary; the first is that of ``<image>``, which a prompt repeats for each patch.
Source: as above."""

_MULTIPLE: Final = 64  # the vocabulary is padded to one: 64,002 to 64,064. Source: as above.


def to_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Convert a checkpoint to the ``-hf`` format; memory for the whole model is needed.

    The rows of the embeddings for added tokens and padding are copies of the row of ``<unk>``, so that none of them is
    ever more likely than ``<unk>``. The small files of the source are kept in ``published.json``.

    Args:
        source: Checkpoint folder or hub id.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If the projector is not that of Yi-VL, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    checkpoint = read_checkpoint(source)
    config, weights = checkpoint.config, checkpoint.weights
    rows = -(-(config.vocab_size + 2) // _MULTIPLE) * _MULTIPLE
    for key in VOCABULARY:
        weights[key] = torch.cat([weights[key], weights[key][:1].expand(rows - config.vocab_size, -1)])
    with checkpoint_dir(target) as new:
        save_torch_state_dict({to_hf_key(key): value for key, value in weights.items()}, new)
        write_json(new / "config.json", _hf_config(config, rows, weights["lm_head.weight"].dtype))
        write_json(new / PUBLISHED, checkpoint.small_files)
        write_json(new / "generation_config.json", _generation_config(checkpoint))
        added = {LLAVA_IMAGE_TOKEN: config.vocab_size, PAD_TOKEN: config.vocab_size + 1}
        write_tokenizer(checkpoint, new, added, {"pad_token": PAD_TOKEN})
        write_processor(checkpoint, new, LLAVA_IMAGE_TOKEN)


def from_hf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, like: str | os.PathLike[str] | None = None
) -> None:
    """Convert a folder in the ``-hf`` format to a Yi-VL checkpoint; memory for the whole model is needed.

    Fields that its ``config.json`` lacks come from ``like``, from ``published.json``, or else from the released models.

    Args:
        source: Folder or hub id, as written by Yi-VL-6B-hf, this module or a later version of transformers.
        target: Replaced if it holds a checkpoint.
        like: Folder of the Yi-VL checkpoint or Yi model whose ``tokenizer.model`` and small files are taken, which
            transformers 5 and LLaMA-Factory leave out; an ``-hf`` folder that has them also counts.

    Raises:
        CheckpointError: If ``source`` is no such folder, weights or files are missing, the tokenizer of ``like`` is not
            that of the model, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    if like is not None and not Path(like).is_dir():
        raise CheckpointError(f"{like}: no such folder; --like takes a local folder")
    folder = resolve_checkpoint(source)
    published = {} if like is None else read_published(like)
    published = read_published(folder) | published if format_of(folder) is HF else published
    config = read_hf_config(folder, published)
    tokenizer = load_hf_tokenizer(folder, config, like)
    clip_processor = _clip_processor(folder, like)
    weights = read_hf_weights(folder, config)
    model = empty_model(config)
    check_keys(folder, model.state_dict(), weights)
    model.generation_config = read_hf_generation_config(folder, config, published)
    save_checkpoint(model, target, tokenizer=tokenizer, image_processor=clip_processor, state_dict=weights)


def _hf_config(config: YiVLConfig, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json``: the fields of Yi-VL-6B-hf, and the number of patches that newer versions read."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": config.num_patches,
        "image_token_index": config.vocab_size,
        "is_yi_vl_derived_model": True,
        "model_type": "llava",
        "pad_token_id": config.vocab_size + 1,
        "projector_hidden_act": "gelu",
        "text_config": text_config(config) | {"torch_dtype": name, "vocab_size": rows},
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "vision_config": vision_config(config),
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": STRATEGIES[config.mm_vision_select_feature],
    }


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``generation_config.json``: an answer also ends at the stop string, and has no maximum length."""
    published = checkpoint.small_files.get("generation_config.json", {})
    stop_ids = tokenize([STOP_STRING], checkpoint.tokenizer)
    fields = {key: value for key, value in published.items() if key != "max_length"}  # of the prompt and the answer
    # A stop string of several tokens cannot be expressed here.
    end = [checkpoint.config.eos_token_id, *(stop_ids if len(stop_ids) == 1 else [])]
    return fields | {"eos_token_id": end, "pad_token_id": checkpoint.config.vocab_size + 1}


def _clip_processor(folder: Path, like: str | os.PathLike[str] | None) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing of the folder, or of ``like`` if it has none."""
    names = ("preprocessor_config.json", "processor_config.json")
    if like is None or any((folder / name).is_file() for name in names):
        return load_hf_clip_processor(folder)
    return read_processors(like, read_config(like))[1]
