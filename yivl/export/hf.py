"""Conversion between Yi-VL checkpoints and the ``-hf`` format of Yi-VL-6B-hf, in both directions and without loss.

The ``-hf`` format is that of transformers' LLaVA before 4.52, with a projector of four layers, two of them LayerNorms,
and with two more tokens. Source: BUAADreamer/Yi-VL-6B-hf, config.json and README.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import PROJECTOR, TOKENIZER_FILES, TOWER, VIT, check_keys, read_json, read_main_weights
from yivl.checkpoint.loading import empty_model
from yivl.checkpoint.saving import check_apart, checkpoint_dir, save_checkpoint
from yivl.errors import CheckpointError
from yivl.export.llava import (
    STRATEGIES,
    TEXT_FIELDS,
    read_checkpoint,
    text_config,
    vision_config,
    write_processor,
    write_tokenizer,
)
from yivl.image_processing import load_clip_processor
from yivl.model.configuration import YiVLConfig
from yivl.tokenization import load_tokenizer

IMAGE_TOKEN: Final = "<image>"
"""The first id after the vocabulary; repeated in a prompt for each patch. Source: as above."""

PAD_TOKEN: Final = "<pad>"
"""The next id. Source: as above."""

_MULTIPLE: Final = 64  # the vocabulary is padded to one: 64,002 to 64,064. Source: as above.
_VOCABULARY: Final = ("model.embed_tokens.weight", "lm_head.weight")

# Prefixes of Yi-VL and of -hf; the first match counts. Source: as above, model.safetensors.index.json.
_NAMES: Final = (
    (f"{PROJECTOR}0.", "multi_modal_projector.linear_1."),
    (f"{PROJECTOR}1.", "multi_modal_projector.linear_2."),
    (f"{PROJECTOR}3.", "multi_modal_projector.linear_3."),
    (f"{PROJECTOR}4.", "multi_modal_projector.linear_4."),
    (TOWER, "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Prefixes of transformers since 4.52, and before. Source: transformers 5, conversion_mapping.py.
_SINCE: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)

_ORIGINALS: Final = "published.json"  # the small files of the source by name, for the conversion back


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
    for key in _VOCABULARY:
        weights[key] = torch.cat([weights[key], weights[key][:1].expand(rows - config.vocab_size, -1)])
    with checkpoint_dir(target) as new:
        save_torch_state_dict({_renamed(key, _NAMES): value for key, value in weights.items()}, new)
        write_json(new / "config.json", _hf_config(config, rows, weights["lm_head.weight"].dtype))
        write_json(new / _ORIGINALS, checkpoint.small_files)
        generation = checkpoint.small_files.get("generation_config.json", {})
        write_json(new / "generation_config.json", generation | {"pad_token_id": config.vocab_size + 1})
        added = {IMAGE_TOKEN: config.vocab_size, PAD_TOKEN: config.vocab_size + 1}
        write_tokenizer(checkpoint, new, added, {"pad_token": PAD_TOKEN})
        write_processor(checkpoint, new, IMAGE_TOKEN)


def from_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Convert a folder in the ``-hf`` format to a Yi-VL checkpoint; memory for the whole model is needed.

    Fields that its ``config.json`` lacks come from ``published.json``, or else from the released models.

    Args:
        source: Folder as written by Yi-VL-6B-hf, this module or a later version of transformers.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If ``source`` is no such folder, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    folder = Path(source)
    originals = read_json(folder / _ORIGINALS) if (folder / _ORIGINALS).is_file() else {}
    config = _yivl_config(folder, originals.get("config.json", {}))
    if not (folder / "tokenizer.model").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model; copy that of the Yi model there")
    weights = {_yivl_key(key): value for key, value in read_main_weights(folder).items()}
    for key in set(_VOCABULARY) & weights.keys():
        weights[key] = weights[key][: config.vocab_size].clone()
    model = empty_model(config)
    check_keys(folder, model.state_dict(), weights)
    if "generation_config.json" in originals:
        model.generation_config = GenerationConfig(**originals["generation_config.json"])
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copyfile(folder / "tokenizer.model", Path(temporary) / "tokenizer.model")
        _write_yivl_tokenizer(folder, Path(temporary), originals, config.vocab_size)
        tokenizer, image_processor = load_tokenizer(temporary), _clip_processor(folder)
        save_checkpoint(model, target, tokenizer=tokenizer, image_processor=image_processor, state_dict=weights)


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def _yivl_key(key: str) -> str:
    key = _renamed(_renamed(key, _SINCE), [(hf, yivl) for yivl, hf in _NAMES])
    # Programs that save the keys of transformers 5.6 in memory leave out the last part of this prefix.
    return f"{VIT}{key.removeprefix(VIT).removeprefix(TOWER)}" if key.startswith(TOWER) else key


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


def _yivl_config(folder: Path, original: Mapping[str, Any]) -> YiVLConfig:
    fields = read_json(folder / "config.json")
    try:
        text = LlamaConfig(**fields["text_config"]).to_dict()
        vision = CLIPVisionConfig(**fields["vision_config"])
        [select_feature] = [
            feature for feature, name in STRATEGIES.items() if name == fields["vision_feature_select_strategy"]
        ]
        config = {
            "image_aspect_ratio": "pad",  # as in the released models
            "mm_vision_tower": "./vit/clip-vit",
            **original,
            **{name: text[name] for name in (*TEXT_FIELDS, "rope_parameters")},
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_feature": select_feature,
            "mm_vision_select_layer": fields["vision_feature_layer"],
            "vision_config": vision,
            "vocab_size": fields["image_token_index"],
        }
        for name in ("model_type", "rope_theta", "rope_scaling"):  # the last two are in rope_parameters
            config.pop(name, None)
        return YiVLConfig(**config)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}/config.json: not the -hf format of a Yi-VL model ({reason})") from error


def _clip_processor(folder: Path) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing from its own file, or from the one that transformers 5 writes for a processor."""
    if not (folder / "preprocessor_config.json").is_file() and (folder / "processor_config.json").is_file():
        fields = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(fields, dict):
            return CLIPImageProcessorPil(**fields)
    return load_clip_processor(folder)


def _write_yivl_tokenizer(folder: Path, target: Path, originals: Mapping[str, Any], vocabulary: int) -> None:
    """Write the small files of the tokenizer: the originals, or else those of ``folder`` without the two tokens."""
    if TOKENIZER_FILES[0] in originals:
        for name in set(TOKENIZER_FILES) & originals.keys():
            write_json(target / name, originals[name])
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
    write_json(target / "tokenizer_config.json", config)
    write_json(target / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    write_json(target / "added_tokens.json", {token: index for token, index in known.items() if index < vocabulary})
