"""Files with the weights of a projector alone: ``mm_projector.bin`` of LLaVA, the ``.pth`` files of InternVL."""

from pathlib import Path

import torch

from yivl.checkpoint.format import PROJECTOR, check_keys, read_weights
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.sharding import gathered


def load_projector(model: YiVLForCausalLM, path: Path) -> None:
    """Copy the weights of a projector file (``.bin``, ``.pth`` or safetensors) into the model, in place.

    Source of the keys: haotian-liu/LLaVA, llava/model/llava_arch.py (all that follows ``mm_projector.``);
    OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py (``0.weight`` to ``3.bias``).

    Raises:
        CheckpointError: If the file cannot be read, or its keys or shapes are not those of the model's projector.
    """
    weights = {key.rpartition("mm_projector.")[2]: value for key, value in read_weights(path).items()}
    projector = model.get_submodule(PROJECTOR.removesuffix("."))
    parameters = dict(projector.named_parameters())
    check_keys(path, parameters, weights, fit=f"a projector of type {model.config.mm_projector_type}")
    with gathered(parameters.values()), torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
