"""The projector from ViT patch features to the embedding space of the language model."""

import re

from torch import nn

from yivl.errors import CheckpointError


def build_projector(projector_type: str, vision_hidden: int, text_hidden: int) -> nn.Module:
    """Return the projector of type ``mm_projector_type``; Yi-VL uses ``mlp2x_gelu_Norm``.

    The types are ``linear``, ``identity``, ``mlpNx_gelu`` (N linear layers with exact GELU between them) and
    ``mlpNx_gelu_Norm``, with a LayerNorm (eps 1e-5) after every linear layer. The indices of the layers are part of
    the checkpoint format: ``mm_projector.{0,1,3,4}`` for Yi-VL.
    Source: 01-ai/Yi, VL/llava/model/multimodal_projector/builder.py.

    Shape: ``(num_images, num_patches, vision_hidden)`` to ``(num_images, num_patches, text_hidden)``.

    Raises:
        CheckpointError: If the type is unknown.
    """
    if projector_type == "linear":
        return nn.Linear(vision_hidden, text_hidden)
    if projector_type == "identity":
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu(_Norm)?", projector_type)
    if match is None:
        raise CheckpointError(
            f"mm_projector_type={projector_type!r}; expected 'linear', 'identity', 'mlpNx_gelu' or 'mlpNx_gelu_Norm'"
        )
    depth, has_norm = int(match[1]), match[2] is not None
    layers: list[nn.Module] = []
    for index in range(depth):
        if index:
            layers.append(nn.GELU())
        layers.append(nn.Linear(text_hidden if index else vision_hidden, text_hidden))
        if has_norm:
            layers.append(nn.LayerNorm(text_hidden))
    return nn.Sequential(*layers)
