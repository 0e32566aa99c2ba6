"""Files with the weights of a projector alone, as LLaVA writes them after its pretraining (``mm_projector.bin``)."""

from pathlib import Path

import torch

from yivl.checkpoint.format import PROJECTOR, check_keys, read_weights
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.vision_tower import gathered


def load_projector(model: YiVLForCausalLM, path: Path) -> None:
    """Copy the weights of a projector file (``.bin`` or safetensors) into the model, in place.

    Source of the keys: haotian-liu/LLaVA, llava/model/llava_arch.py (all that follows ``mm_projector.``).

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
