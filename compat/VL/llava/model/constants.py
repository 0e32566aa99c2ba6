"""Ids and names. Source: 01-ai/Yi, VL/llava/model/constants.py."""

from yivl.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX

__all__ = ["DEFAULT_IMAGE_TOKEN", "IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "key_info"]

key_info: dict[str, str | None] = {"model_path": None}
"""Callers write the checkpoint folder here. Nothing reads it: the ViT's path starts at the folder that is loaded."""
