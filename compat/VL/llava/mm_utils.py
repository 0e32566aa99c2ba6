"""Loading, images and tokens. Source: 01-ai/Yi, VL/llava/mm_utils.py."""

from yivl.mm_utils import (
    IMAGE_TOKEN_INDEX,
    KeywordsStoppingCriteria,
    expand2square,
    get_model_name_from_path,
    load_image_from_base64,
    load_pretrained_model,
    process_images,
    tokenizer_image_token,
)

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
