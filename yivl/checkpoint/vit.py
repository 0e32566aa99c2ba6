"""ViT weights in files: the ``vit/`` folder of a checkpoint, a CLIP or InternViT folder, an open_clip checkpoint.

Keys become those of ``CLIPVisionModel`` without ``vision_model.``, a prefix that transformers 5.6 dropped in memory;
those of InternViT stay, without the same prefix.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.format import StateDict, check_keys, find_weights, read_json, read_main_weights, read_weights
from yivl.errors import CheckpointError
from yivl.files.schema import OpenClipPreprocessing, OpenClipVision
from yivl.files.validation import check_fields, library_errors
from yivl.model.configuration import fields_for
from yivl.model.internvl_configuration import InternVisionConfig
from yivl.model.sharding import gathered

_PREFIX = "vision_model."
OPEN_CLIP_CONFIG: Final = "open_clip_config.json"
OPEN_CLIP_WEIGHTS: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""In the order of preference of open_clip."""

# open_clip name -> name here. Source: open_clip 3, src/open_clip/transformer.py; transformers 5, modeling_clip.py.
_OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_OPEN_CLIP_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read_clip_weights(folder: str | os.PathLike[str]) -> StateDict:
    """Return the ViT weights of a CLIP, CLIP-vision, InternViT or open_clip folder, or of a weight file of open_clip.

    Where a folder holds both forms, as in the released checkpoints, that of transformers is read.

    Raises:
        CheckpointError: If the folder holds no weights.
    """
    if Path(folder).is_file():
        return open_clip_to_vit_weights(read_weights(Path(folder)))
    if is_open_clip(folder):
        return open_clip_to_vit_weights(read_weights(find_weights(folder, OPEN_CLIP_WEIGHTS)))
    state_dict = read_main_weights(folder)
    if any(key.startswith(_PREFIX) for key in state_dict):
        state_dict = {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    return {key: value for key, value in state_dict.items() if not key.endswith("position_ids")}


def read_vit_config(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """Return the vision configuration of a CLIP, CLIP-vision, InternViT or open_clip folder.

    Raises:
        CheckpointError: If there is none.
    """
    if is_open_clip(folder):
        return read_open_clip_config(Path(folder) / OPEN_CLIP_CONFIG)
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder}: no ViT; expected config.json (CLIP of transformers) or open_clip_config.json")
    return read_vision_config(Path(folder) / "config.json")


def read_open_clip_processor(path: Path) -> CLIPImageProcessorPil:
    """Return the preprocessing in an ``open_clip_config.json``, of any image size.

    Raises:
        CheckpointError: If the file is missing, or a field has a wrong type or value.
    """
    fields = read_json(path).get("preprocess_cfg", {})
    check_fields(path, fields, OpenClipPreprocessing)
    return open_clip_processor(fields)


def open_clip_processor(fields: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """Return CLIP preprocessing with the mean and standard deviation of open_clip, of any image size."""
    names = {"image_mean": "mean", "image_std": "std"}
    given = {ours: list(fields[theirs]) for ours, theirs in names.items() if fields.get(theirs)}
    return CLIPImageProcessorPil(**given)


def read_vision_config(path: Path) -> PreTrainedConfig:
    """Return the vision configuration in a ``config.json``, whether of a ViT or of a CLIP that holds one.

    Raises:
        CheckpointError: If the file is missing, or a field has a wrong type or value.
    """
    fields = read_json(path)
    return vision_config(fields.get("vision_config", fields), path)


def vision_config(fields: Any, source: str | os.PathLike[str]) -> PreTrainedConfig:
    """Return the configuration of a ViT.

    Args:
        fields: Of the configuration, checked.
        source: Of the fields, for the error.

    Raises:
        CheckpointError: If transformers refuses them, or a patch is larger than the image.
    """
    kind: type[PreTrainedConfig] = CLIPVisionConfig
    if fields.get("model_type") == InternVisionConfig.model_type:
        kind = InternVisionConfig
    with library_errors(source):
        config = kind(**fields_for(kind, fields))
    if config.patch_size > config.image_size:
        raise CheckpointError(f"{source}: patch_size is {config.patch_size}; expected at most {config.image_size}")
    return config


def is_open_clip(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an open_clip model and no CLIP of transformers; timm writes a ``config.json`` too."""
    if not (Path(folder) / OPEN_CLIP_CONFIG).is_file():
        return False
    config = Path(folder) / "config.json"
    return not config.is_file() or not {"vision_config", "hidden_size"} & read_json(config).keys()


def copy_vit_weights(vit: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str) -> int:
    """Copy ``weights`` into the ViT and return the number of tensors that changed.

    Raises:
        CheckpointError: If a key is missing, unexpected or of a wrong shape, or the ViT was offloaded.
    """
    own = dict(vit.named_parameters())
    if any(parameter.device.type == "meta" for parameter in own.values()):
        raise CheckpointError(f"{source}: the device has no memory for the ViT; quantize the model or use --device cpu")
    check_keys(source, own, weights, fit="the configuration of the ViT")
    num_different = 0
    with gathered(own.values()), torch.no_grad():
        for key, parameter in own.items():
            value = weights[key].to(device=parameter.device, dtype=parameter.dtype)
            num_different += int(not torch.equal(parameter, value))
            parameter.copy_(value)
    return num_different


def open_clip_to_vit_weights(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Return the visual tower of an open_clip checkpoint under the keys of this module.

    Args:
        state_dict: Of a whole open_clip model (``visual.*`` keys) or of its visual tower alone.

    Raises:
        CheckpointError: If a key is unknown: the tower is not a plain CLIP ViT.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if any(key.startswith("visual.") for key in state_dict):
        state_dict = {key.removeprefix("visual."): v for key, v in state_dict.items() if key.startswith("visual.")}
    weights: StateDict = {}
    for key, value in state_dict.items():
        if key == "proj":  # the projection to the contrastive space
            continue
        if key.startswith("transformer.resblocks."):
            _, _, index, rest = key.split(".", 3)
            layer = f"encoder.layers.{index}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    weights[f"{layer}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            else:
                weights[f"{layer}.{_rename(rest, _OPEN_CLIP_BLOCK_NAMES, key)}"] = value
        else:
            weights[_rename(key, _OPEN_CLIP_NAMES, key)] = value
    return weights


def _rename(key: str, names: Mapping[str, str], full_key: str) -> str:
    """Replace a whole key, or the module part before its last dot."""
    module, _, kind = key.rpartition(".")
    if key in names:
        return names[key]
    if module in names:
        return f"{names[module]}.{kind}"
    raise CheckpointError(f"open_clip key visual.{full_key} is not part of a plain CLIP ViT")


def read_open_clip_config(path: Path) -> CLIPVisionConfig:
    """Return the configuration of the visual tower in an ``open_clip_config.json``.

    Raises:
        CheckpointError: If it does not describe a ViT.
    """
    fields = read_json(path)
    return read_open_clip_model(fields.get("model_cfg", fields), path)


def read_open_clip_model(fields: Mapping[str, Any], source: str | os.PathLike[str]) -> CLIPVisionConfig:
    """Return the configuration of the visual tower in the configuration of an open_clip model.

    Args:
        fields: ``model_cfg`` of an ``open_clip_config.json``, or of a model in open_clip's registry.
        source: Of the fields, for the error.

    Raises:
        CheckpointError: If they do not describe a plain ViT.
    """
    vision = fields.get("vision_cfg")
    if not isinstance(vision, dict) or isinstance(vision.get("layers"), list):  # a ResNet has a list
        raise CheckpointError(f"{source}: not the configuration of an open_clip ViT (a ResNet, or no vision_cfg)")
    check_fields(f"{source}: not the configuration of an open_clip ViT (vision_cfg)", vision, OpenClipVision)
    width = vision["width"]
    with library_errors(source):
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
            num_hidden_layers=vision["layers"],
            num_attention_heads=width // vision.get("head_width", 64),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="quick_gelu" if fields.get("quick_gelu") else "gelu",  # the sigmoid approximation
            layer_norm_eps=1e-5,
        )
