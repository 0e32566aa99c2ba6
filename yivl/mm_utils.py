"""Functions of the reference implementation's ``llava.mm_utils``, for code written against it.

Nothing in the package depends on this module. docs/fidelity.md lists the differences.
"""

import base64
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl import image_processing
from yivl.checkpoint.loading import load_model
from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer, tokenizer_image_token

__all__ = [
    "IMAGE_TOKEN_INDEX",
    "KeywordsStoppingCriteria",
    "expand2square",
    "get_model_name_from_path",
    "load_image_from_base64",
    "load_pretrained_model",
    "process_images",
    "tokenizer_image_token",
]


def load_pretrained_model(
    model_path: str | os.PathLike[str],
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] = "auto",
    multimodal: str = "IMAGE",
    *,
    torch_dtype: torch.dtype | None = None,
) -> tuple[YiTokenizer, YiVLForCausalLM, CLIPImageProcessorPil, int]:
    """Return tokenizer, model, CLIP image processor and context length in tokens.

    Args:
        model_path: Checkpoint folder or hub id.
        load_8bit: int8 weights.
        load_4bit: 4-bit weights.
        device_map: ``"auto"``, a device, or a map of modules to devices.
        multimodal: No effect, as in the reference.
        torch_dtype: ``None`` keeps the dtype of the checkpoint.
    """
    loaded = load_model(
        model_path,
        device=device_map,
        dtype="auto" if torch_dtype is None else torch_dtype,
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
    )
    context_length: int = loaded.model.config.max_position_embeddings
    return loaded.tokenizer, loaded.model, loaded.image_processor.clip_processor, context_length


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Load a base64-encoded image, upright and validated."""
    return image_processing.load_image(base64.b64decode(image))


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, int, int]) -> Image.Image:
    """Return the image in RGB, centered on a square of the background color; an integer is a gray level."""
    background = (background_color,) * 3 if isinstance(background_color, int) else background_color
    return image_processing.expand2square(image_processing.to_rgb(pil_img, background), background)


def process_images(
    images: Sequence[Image.Image], image_processor: CLIPImageProcessorPil, model_cfg: YiVLConfig
) -> torch.Tensor:
    """Return ``pixel_values``, ``(num_images, 3, image_size, image_size)``, padded where ``model_cfg`` says so."""
    return image_processing.ImageProcessor(image_processor, model_cfg.image_aspect_ratio)(images)


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of a path, prefixed by the name of the run for a ``checkpoint-N``."""
    *_, run, name = ["", *model_path.strip("/").split("/")]
    return f"{run}_{name}" if name.startswith("checkpoint-") else name


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops once the new text of every row has every keyword; never at the first new token, as in the reference."""

    def __init__(self, keywords: Sequence[str], tokenizer: YiTokenizer, input_ids: torch.Tensor) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer
        self.start_len = input_ids.shape[1]
        self.saw_first_token = False

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> bool:
        """Return whether to stop all rows."""
        stops = False
        if self.saw_first_token:
            texts = self.tokenizer.batch_decode(output_ids[:, self.start_len :].tolist(), skip_special_tokens=True)
            stops = all(keyword in text for text in texts for keyword in self.keywords)
        self.saw_first_token = True
        return stops
