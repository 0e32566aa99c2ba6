"""The folder that SGLang's Yi-VL class reads: the published layout, and what that class asks for beside it.

Source: sgl-project/sglang, python/sglang/srt/models/{yivl,llava}.py and multimodal/processors/llava.py.
"""

import os

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.saving import check_apart, checkpoint_dir, write_checkpoint
from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.export.published import (
    empty_model,
    read_published,
    text_config,
    vision_config,
    write_processor,
    write_tokenizer,
)
from yivl.model.configuration import read_json


def to_sglang(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint for SGLang; memory for the whole model is needed.

    Its ``config.json`` names SGLang's class, describes both parts with their true values, and says which token is the
    picture: ``<image_placeholder>``, which the tokenizer gets as its first id behind the vocabulary. The template of
    the tokenizer is the prompt of Yi-VL. SGLang takes the ViT of the main files, so both copies are that of ``vit/``.

    Args:
        source: Folder in the published layout, or hub id.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If the projector is not that of Yi-VL, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    published = read_published(source)
    config = published.config
    with checkpoint_dir(target) as new:
        write_checkpoint(
            empty_model(config),
            new,
            tokenizer=published.tokenizer,
            image_processor=published.image_processor.clip_processor,
            state_dict=published.weights,
        )
        fields = {
            "architectures": ["YiVLForCausalLM"],
            "ignore_index": -100,
            "image_token_index": config.vocab_size,
            "projector_hidden_act": "gelu",
            "text_config": text_config(config),
            "vision_config": vision_config(config),
        }
        write_json(new / "config.json", read_json(new / "config.json") | fields)
        write_tokenizer(published, new, {DEFAULT_IMAGE_TOKEN: config.vocab_size}, {})
        write_processor(published, new, DEFAULT_IMAGE_TOKEN)
