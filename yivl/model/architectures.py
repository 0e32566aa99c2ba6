"""The classes of an architecture: that of the configuration by its ViT, that of the model by its configuration."""

import os
from typing import Final

from transformers import PreTrainedConfig

from yivl.errors import CheckpointError
from yivl.model.configuration import YiVLConfig
from yivl.model.internvl import InternVLChatModel
from yivl.model.internvl_configuration import InternVLConfig
from yivl.model.modeling import YiVLForCausalLM

_MODELS: Final[dict[type[YiVLConfig], type[YiVLForCausalLM]]] = {
    YiVLConfig: YiVLForCausalLM,
    InternVLConfig: InternVLChatModel,
}


def config_class(vision_config: PreTrainedConfig) -> type[YiVLConfig]:
    """Return the class of configurations with a kind of ViT."""
    return next(kind for kind in _MODELS if isinstance(vision_config, kind.sub_configs["vision_config"]))


def model_class(config: YiVLConfig) -> type[YiVLForCausalLM]:
    """Return the class that implements the architecture of a configuration."""
    return _MODELS[type(config)]


def check_class(kind: type[YiVLForCausalLM], config: YiVLConfig, source: str | os.PathLike[str]) -> None:
    """Check that a class, or the one it is derived from, implements the architecture of a configuration.

    Args:
        kind: Of the model that is asked for.
        config: Of the checkpoint.
        source: The checkpoint, for the error.

    Raises:
        CheckpointError: If another class implements it.
    """
    own, expected = next(base for base in kind.__mro__ if base in _MODELS.values()), model_class(config)
    if own is not expected:
        raise CheckpointError(
            f"{source}: not a checkpoint of {own.__name__}; use {expected.__module__}.{expected.__name__}, or "
            "yivl.mm_utils.load_pretrained_model"
        )
