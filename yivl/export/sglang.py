"""Export for SGLang's Yi-VL class: a checkpoint, and the files that class needs in addition.

Source: sgl-project/sglang, python/sglang/srt/models/{yivl,llava}.py and multimodal/processors/llava.py.
"""

import os

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import read_json
from yivl.checkpoint.loading import empty_model
from yivl.checkpoint.saving import check_apart, checkpoint_dir, write_checkpoint
from yivl.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from yivl.export.llava import read_checkpoint, text_config, vision_config, write_processor, write_tokenizer


def to_sglang(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Export a checkpoint for SGLang; memory for the whole model is needed.

    ``config.json`` names SGLang's class, describes both parts of the model, and gives the id of the image token
    ``<image_placeholder>``, the first after the vocabulary. The chat template is the prompt of Yi-VL. SGLang takes
    the ViT of the main files, so both copies are that of ``vit/``.

    Args:
        source: Checkpoint folder or hub id.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If the projector is not that of Yi-VL, weights are missing, or ``target`` may not be replaced.
    """
    check_apart(source, target)
    checkpoint = read_checkpoint(source)
    config = checkpoint.config
    with checkpoint_dir(target) as new:
        write_checkpoint(
            empty_model(config),
            new,
            tokenizer=checkpoint.tokenizer,
            image_processor=checkpoint.image_processor.clip_processor,
            state_dict=checkpoint.weights,
        )
        fields = {
            "architectures": ["YiVLForCausalLM"],
            "ignore_index": IGNORE_INDEX,
            "image_token_index": config.vocab_size,
            "projector_hidden_act": "gelu",
            "text_config": text_config(config),
            "vision_config": vision_config(config),
        }
        write_json(new / "config.json", read_json(new / "config.json") | fields)
        write_tokenizer(checkpoint, new, {DEFAULT_IMAGE_TOKEN: config.vocab_size}, {})
        write_processor(checkpoint, new, DEFAULT_IMAGE_TOKEN)
