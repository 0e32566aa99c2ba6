"""Configuration and model. Source: 01-ai/Yi, VL/llava/model/__init__.py."""

import os
from typing import Any

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import read_config, read_processors
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.vision_tower import VisionTower

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM"]


class LlavaConfig(YiVLConfig):
    """The configuration with the reference's ``from_pretrained``."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **_: Any) -> YiVLConfig:
        """Return the configuration of a checkpoint folder or hub id."""
        return read_config(resolve_checkpoint(folder))


class CLIPVisionTower(VisionTower):
    """The vision tower with the attributes that callers use; its weights are loaded with the model."""

    is_loaded = True
    image_processor: CLIPImageProcessorPil

    def load_model(self) -> None:
        """Do nothing; the weights are loaded already."""


class LlavaLlamaForCausalLM(YiVLForCausalLM):
    """The model for callers that load model, tokenizer and image processor separately."""

    _no_split_modules = [*YiVLForCausalLM._no_split_modules, "CLIPVisionTower"]  # noqa: RUF012 (as there)

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.model.vision_tower = CLIPVisionTower(config)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> "LlavaLlamaForCausalLM":
        """Load a checkpoint folder or hub id; the arguments are those of transformers."""
        checkpoint = resolve_checkpoint(folder)
        model = super().from_pretrained(checkpoint, **kwargs)
        _, model.get_vision_tower().image_processor = read_processors(checkpoint, model.config)
        return model
