"""What bridges read of a published checkpoint, and what other programs want beside the weights."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaTokenizer

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import BUFFERS, StateDict, check_checkpoint_files, read_weights
from yivl.checkpoint.loading import read_small_files, resolve_checkpoint
from yivl.checkpoint.saving import TOWER
from yivl.checkpoint.vit import read_vit_weights
from yivl.errors import CheckpointError
from yivl.export.template import chat_template
from yivl.image_processing import ImageProcessor
from yivl.model.configuration import YiVLConfig, read_json
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer

TOKENIZER_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Beside ``tokenizer.model``."""

STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}
"""``mm_vision_select_feature`` and ``vision_feature_select_strategy`` of transformers' LLaVA."""

TEXT_FIELDS: Final = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)
"""Of the language model, beside its vocabulary and its rotary embedding."""


@dataclass(frozen=True)
class Published:
    """A checkpoint in the published layout."""

    folder: Path
    config: YiVLConfig
    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    weights: StateDict
    """All of them by their published names; the ViT is that of ``vit/``, as when the model is loaded."""
    small_files: dict[str, dict[str, Any]]
    """``config.json``, ``generation_config.json`` and those of the tokenizer, as far as they are there."""


def read_published(source: str | os.PathLike[str]) -> Published:
    """Read a checkpoint in full.

    Args:
        source: Folder in the published layout, or hub id.

    Raises:
        CheckpointError: If something is missing or damaged, weights do not fit the configuration, or the projector is
            not that of Yi-VL: other programs know no other.
    """
    folder = resolve_checkpoint(source)
    config, tokenizer, image_processor = read_small_files(folder)
    if config.mm_projector_type != "mlp2x_gelu_Norm":
        raise CheckpointError(
            f"{folder}: mm_projector_type={config.mm_projector_type!r}; other programs read only 'mlp2x_gelu_Norm'"
        )
    weights = read_main_weights(folder)
    vit = read_vit_weights(folder, config.mm_vision_tower)
    weights |= {f"{TOWER}vision_model.{key}": value for key, value in vit.items()}
    check_weights(folder, empty_model(config), weights)
    names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    small_files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    return Published(folder, config, tokenizer, image_processor, weights, small_files)


def read_main_weights(folder: Path) -> StateDict:
    """Return the weights of the main files of a checkpoint."""
    weights: StateDict = {}
    for path in check_checkpoint_files(folder):
        weights |= read_weights(path)
    return {key: value for key, value in weights.items() if not key.endswith(BUFFERS)}


def empty_model(config: YiVLConfig) -> YiVLForCausalLM:
    """Return the model without its weights."""
    with torch.device("meta"):
        return YiVLForCausalLM(config)


def check_weights(folder: Path, model: YiVLForCausalLM, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes with those of the model.

    Raises:
        CheckpointError: If they differ.
    """
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    found = {key: list(value.shape) for key, value in weights.items()}
    if wanted != found:
        strange = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise CheckpointError(
            f"{folder}: {len(strange)} tensors do not fit config.json, such as {strange[0]}: "
            f"{found.get(strange[0], 'missing')}, expected {wanted.get(strange[0], 'none')}"
        )


def text_config(config: YiVLConfig) -> dict[str, Any]:
    """Return the configuration of the language model alone."""
    fields = config.to_published_dict()
    names = (*TEXT_FIELDS, "rope_scaling", "rope_theta", "torch_dtype", "vocab_size")
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {name: fields[name] for name in names if name in fields} | own


def vision_config(config: YiVLConfig) -> dict[str, Any]:
    """Return the configuration of the ViT alone."""
    fields: dict[str, Any] = config.vision_config.to_diff_dict() | {"model_type": "clip_vision_model"}
    fields.pop("_name_or_path", None)  # a folder of this machine
    return fields


def write_tokenizer(published: Published, new: Path, added: dict[str, int], special: dict[str, str]) -> None:
    """Write the tokenizer with more tokens, as files for programs old and new, and the right prompt as its template.

    Args:
        published: The checkpoint.
        new: Folder to write to.
        added: Tokens and their ids behind the vocabulary; the first stands for a picture.
        special: What they are, such as ``pad_token``.
    """
    shutil.copyfile(published.folder / "tokenizer.model", new / "tokenizer.model")
    config, known_special, known = (published.small_files.get(name, {}) for name in TOKENIZER_FILES)
    decoder = config.get("added_tokens_decoder", {}) | {
        str(index): {"content": token, "special": True}
        | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for token, index in added.items()
    }
    template = chat_template(next(iter(added)))
    (new / "chat_template.jinja").write_text(template, encoding="utf-8")  # where processors look for it
    changes = {"added_tokens_decoder": decoder, "chat_template": template}
    changes |= {"processor_class": "LlavaProcessor", "tokenizer_class": "LlamaTokenizer"}
    write_json(new / "tokenizer_config.json", config | changes | special)
    write_json(new / "special_tokens_map.json", known_special | special)
    write_json(new / "added_tokens.json", known | added)
    tokenizer = LlamaTokenizer.from_pretrained(os.fspath(new), add_prefix_space=False)
    tokenizer.backend_tokenizer.save(os.fspath(new / "tokenizer.json"))


def write_processor(published: Published, new: Path, image_token: str) -> None:
    """Write the CLIP preprocessing under the name that all versions know, and what ``LlavaProcessor`` needs."""
    config = published.config
    names = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(new / "preprocessor_config.json", published.image_processor.clip_processor.to_dict() | names)
    write_json(
        new / "processor_config.json",
        {
            "image_token": image_token,
            "num_additional_image_tokens": 1,  # the class token, which "default" drops
            "patch_size": config.vision_config.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": STRATEGIES[config.mm_vision_select_feature],
        },
    )
