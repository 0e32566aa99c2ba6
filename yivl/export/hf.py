"""The published layout and the ``-hf`` layout of Yi-VL-6B-hf, both ways, without loss.

The ``-hf`` layout is that of transformers' LLaVA before 4.52, with a projector of four layers, two of them LayerNorms,
and with two more tokens. Source: BUAADreamer/Yi-VL-6B-hf, config.json and README.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.saving import TOWER, check_apart, checkpoint_dir, save_checkpoint, save_shards
from yivl.errors import CheckpointError
from yivl.export.published import (
    STRATEGIES,
    TEXT_FIELDS,
    TOKENIZER_FILES,
    check_weights,
    empty_model,
    read_main_weights,
    read_published,
    text_config,
    vision_config,
    write_processor,
    write_tokenizer,
)
from yivl.image_processing import load_clip_processor
from yivl.model.configuration import YiVLConfig, read_json
from yivl.tokenization import load_tokenizer

IMAGE_TOKEN: Final = "<image>"
"""Takes the first id behind the vocabulary; in a prompt it stands once for each patch. Source: as above."""

PAD_TOKEN: Final = "<pad>"
"""Takes the next id. Source: as above."""

_MULTIPLE: Final = 64  # of which the vocabulary is one: 64,000 and two tokens are 64,064. Source: as above.
_VOCABULARY: Final = ("model.embed_tokens.weight", "lm_head.weight")

# Ours and theirs; the first that fits is taken. Source: as above, model.safetensors.index.json.
_NAMES: Final = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.1.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.3.", "multi_modal_projector.linear_3."),
    ("model.mm_projector.4.", "multi_modal_projector.linear_4."),
    (TOWER, "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# What transformers has written since 4.52, and the same before. Source: transformers 5, conversion_mapping.py.
_SINCE: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)

_PUBLISHED: Final = "published.json"  # the small published files as they were, by name, for the way back


def to_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint in the ``-hf`` layout; memory for the whole model is needed.

    Rows of the new tokens, and those that pad the vocabulary, are copies of the row of ``<unk>``, so that none of them
    is ever more likely than ``<unk>``. The small published files go along in ``published.json``.

    Args:
        source: Folder in the published layout, or hub id.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If the projector is not that of Yi-VL, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    published = read_published(source)
    config, weights = published.config, published.weights
    rows = -(-(config.vocab_size + 2) // _MULTIPLE) * _MULTIPLE
    for key in _VOCABULARY:
        weights[key] = torch.cat([weights[key], weights[key][:1].expand(rows - config.vocab_size, -1)])
    with checkpoint_dir(target) as new:
        save_shards({_renamed(key, _NAMES): value.contiguous() for key, value in weights.items()}, new, "5GB")
        write_json(new / "config.json", _their_config(config, rows, weights["lm_head.weight"].dtype))
        write_json(new / _PUBLISHED, published.small_files)
        generation = published.small_files.get("generation_config.json", {})
        write_json(new / "generation_config.json", generation | {"pad_token_id": config.vocab_size + 1})
        added = {IMAGE_TOKEN: config.vocab_size, PAD_TOKEN: config.vocab_size + 1}
        write_tokenizer(published, new, added, {"pad_token": PAD_TOKEN})
        write_processor(published, new, IMAGE_TOKEN)


def from_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint in the published layout; memory for the whole model is needed.

    What ``config.json`` does not say is taken from ``published.json``, and without that from the released models.

    Args:
        source: Folder in the ``-hf`` layout as Yi-VL-6B-hf, this module or a later version of transformers write it.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If ``source`` is no such folder, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    folder = Path(source)
    published = read_json(folder / _PUBLISHED) if (folder / _PUBLISHED).is_file() else {}
    config = _our_config(folder, published.get("config.json", {}))
    if not (folder / "tokenizer.model").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model; copy that of the Yi model there")
    weights = {_to_ours(key): value for key, value in read_main_weights(folder).items()}
    for key in set(_VOCABULARY) & weights.keys():
        weights[key] = weights[key][: config.vocab_size].clone()
    model = empty_model(config)
    check_weights(folder, model, weights)
    if "generation_config.json" in published:
        model.generation_config = GenerationConfig(**published["generation_config.json"])
    with tempfile.TemporaryDirectory() as own:
        shutil.copyfile(folder / "tokenizer.model", Path(own) / "tokenizer.model")
        _write_our_tokenizer(folder, Path(own), published, config.vocab_size)
        tokenizer, image_processor = load_tokenizer(own), _clip_processor(folder)
        save_checkpoint(model, target, tokenizer=tokenizer, image_processor=image_processor, state_dict=weights)


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def _to_ours(key: str) -> str:
    key = _renamed(_renamed(key, _SINCE), [(theirs, ours) for ours, theirs in _NAMES])
    # transformers 5.6 dropped this part in memory, and programs that save from there do too.
    return (
        key
        if not key.startswith(TOWER)
        else f"{TOWER}vision_model.{key.removeprefix(TOWER).removeprefix('vision_model.')}"
    )


def _their_config(config: YiVLConfig, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of ``config.json``; those of Yi-VL-6B-hf, and the number of patches that newer readers use."""
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


def _our_config(folder: Path, published: Mapping[str, Any]) -> YiVLConfig:
    fields = read_json(folder / "config.json")
    try:
        text = LlamaConfig(**fields["text_config"]).to_dict()
        vision = CLIPVisionConfig(**fields["vision_config"])
        [select_feature] = [
            ours for ours, theirs in STRATEGIES.items() if theirs == fields["vision_feature_select_strategy"]
        ]
        ours = {
            "image_aspect_ratio": "pad",  # as in the released models
            "mm_vision_tower": "./vit/clip-vit",
            **published,
            **{name: text[name] for name in (*TEXT_FIELDS, "rope_parameters")},
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_feature": select_feature,
            "mm_vision_select_layer": fields["vision_feature_layer"],
            "vision_config": vision,
            "vocab_size": fields["image_token_index"],
        }
        for name in ("model_type", "rope_theta", "rope_scaling"):  # the last two are in rope_parameters
            ours.pop(name, None)
        return YiVLConfig(**ours)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}/config.json: not the -hf layout of a Yi-VL model ({reason})") from error


def _clip_processor(folder: Path) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing, from the file of its own or that of transformers 5 for all of a processor."""
    if not (folder / "preprocessor_config.json").is_file() and (folder / "processor_config.json").is_file():
        fields = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(fields, dict):
            return CLIPImageProcessorPil(**fields)
    return load_clip_processor(folder)


def _write_our_tokenizer(folder: Path, new: Path, published: Mapping[str, Any], vocabulary: int) -> None:
    """Write the tokenizer's small files: the published ones, or else theirs without the two tokens."""
    if TOKENIZER_FILES[0] in published:
        for name in set(TOKENIZER_FILES) & published.keys():
            write_json(new / name, published[name])
        return
    config, special, known = (read_json(folder / name) if (folder / name).is_file() else {} for name in TOKENIZER_FILES)
    decoder = config.get("added_tokens_decoder", {})
    config |= {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {index: token for index, token in decoder.items() if int(index) < vocabulary},
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    for name in ("chat_template", "extra_special_tokens", "image_token", "processor_class"):
        config.pop(name, None)
    write_json(new / "tokenizer_config.json", config)
    write_json(new / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    write_json(new / "added_tokens.json", {token: index for token, index in known.items() if index < vocabulary})
