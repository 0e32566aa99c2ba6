"""Ids and names. Source: 01-ai/Yi, VL/llava/model/constants.py."""

from yivl.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX

__all__ = ["DEFAULT_IMAGE_TOKEN", "IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "key_info"]

key_info: dict[str, str | None] = {"model_path": None}
"""Callers store the checkpoint folder here. It is not read: the path of the ViT is relative to the loaded folder."""
