"""ViTs that initialize a vision tower: local folders, hub ids, and the pretrained models of open_clip."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.download import Fetch, download_model, fetch_first, fetch_main_weights, reason_of
from yivl.checkpoint.format import StateDict
from yivl.checkpoint.vit import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    is_open_clip,
    open_clip_processor,
    read_clip_weights,
    read_open_clip_model,
    read_open_clip_processor,
    read_vit_config,
)
from yivl.errors import CheckpointError
from yivl.image_processing import load_clip_processor

OPEN_CLIP: Final = "open_clip:"
"""Prefix of a model of open_clip and its pretrained tag: ``open_clip:ViT-H-14/laion2b_s32b_b79k``."""

_SMALL_FILES: Final = ("config.json", "preprocessor_config.json", "*.index.json", OPEN_CLIP_CONFIG)


@dataclass(frozen=True)
class ViTSource:
    """A ViT whose small files were read."""

    name: str
    """Of its folder in ``vit/`` of the checkpoints that are trained from it."""
    path: Path
    """Folder, or weight file of open_clip."""
    config: PreTrainedConfig
    clip_processor: CLIPImageProcessorPil
    """CLIP preprocessing with the mean and standard deviation of this ViT."""

    def read_weights(self) -> StateDict:
        """Return the weights under the keys of ``yivl.checkpoint.vit``.

        Raises:
            CheckpointError: If they are missing or damaged, or not those of a plain CLIP ViT or an InternViT.
        """
        return read_clip_weights(self.path)


def resolve_vit(name: str, *, weights: bool = True) -> ViTSource:
    """Return the ViT of ``--vision_tower``, after downloading what of it is not on this machine.

    Args:
        name: Folder, hub id or ``modelscope:`` id of a CLIP in the format of transformers or open_clip, or of an
            InternViT-6B; or ``open_clip:MODEL/TAG`` with a pretrained tag or the path of a checkpoint.
        weights: Whether to download weights, too; ``read_weights`` needs them.

    Raises:
        CheckpointError: If there is no such ViT, or it cannot be reached or read.
    """
    if name.startswith(OPEN_CLIP):
        return _from_open_clip(name, weights=weights)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        folder, last = path, path.resolve().name
    else:
        expected = "a ViT folder, a hub id such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K, or open_clip:MODEL/TAG"
        fetch_rest = _fetch_weights if weights else _fetch_nothing
        folder, last = download_model(name, [*_SMALL_FILES], fetch_rest, expected), name.split("/")[-1]
    return ViTSource(last, folder, read_vit_config(folder), _clip_processor(folder))


def _fetch_weights(folder: Path, fetch: Fetch) -> None:
    if is_open_clip(folder):
        fetch_first(folder, fetch, OPEN_CLIP_WEIGHTS)
    else:
        fetch_main_weights(folder, fetch)


def _fetch_nothing(folder: Path, fetch: Fetch) -> None:
    pass


def _clip_processor(folder: Path) -> CLIPImageProcessorPil:
    if is_open_clip(folder):
        return read_open_clip_processor(folder / OPEN_CLIP_CONFIG)
    return load_clip_processor(folder)


def _from_open_clip(name: str, *, weights: bool) -> ViTSource:
    """Return a model of open_clip's registry, with weights it downloads or those of a local checkpoint."""
    import open_clip  # slow

    model, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if model not in open_clip.list_models():
        raise CheckpointError(f"{name}: open_clip has no model {model!r}; open_clip.list_models() returns their names")
    fields, tag = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, pretrained)
    file = Path(os.path.expanduser(pretrained))
    if not tag and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise CheckpointError(f"{name}: no pretrained tag of {model} and no file; its tags: {tags}")
    # Some tags were trained with another activation than the model of their name.
    fields["quick_gelu"] = tag.get("quick_gelu", False) or fields.get("quick_gelu", False)
    config = read_open_clip_model(fields, name)
    if tag and weights:
        try:
            file = Path(open_clip.download_pretrained(tag))
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name}: open_clip could not download the weights ({reason_of(error)})") from error
    last = f"{model}-{pretrained if tag else file.stem}"
    return ViTSource(last, file, config, open_clip_processor(tag))
