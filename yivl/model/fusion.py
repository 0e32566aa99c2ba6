"""Text and images into one sequence: every ``-200`` becomes ``num_patches`` positions. Pure functions, no loops.

Shapes use ``batch`` rows, ``seq`` ids before and ``fused`` positions after the expansion.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Expanded:
    """Row layout after expansion; every tensor is ``(batch, fused)``."""

    input_ids: torch.Tensor  # int64; IMAGE_TOKEN_INDEX at image positions, 0 at padding
    attention_mask: torch.Tensor  # int64, 0 at padding
    labels: torch.Tensor | None  # int64; IGNORE_INDEX at image positions and padding


def expand_placeholders(
    input_ids: torch.Tensor,
    num_patches: int,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    padding_side: PaddingSide = "right",
) -> Expanded:
    """Give every ``-200`` its ``num_patches`` positions and re-pad the rows on ``padding_side``.

    Padding is what ``attention_mask`` says, on whichever side it was; it is dropped before the rows are laid out anew.

    Args:
        input_ids: ``(batch, seq)`` int64.
        num_patches: Positions of one image.
        attention_mask: ``(batch, seq)``, 0 at padding; ``None`` means no padding.
        labels: ``(batch, seq)`` int64, or ``None``.
        padding_side: Where shorter rows are padded.
    """
    is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.long)
    # Number of fused positions of each id, and where its last one lies in its row.
    widths = torch.where(input_ids == IMAGE_TOKEN_INDEX, num_patches, 1) * is_real
    ends = widths.cumsum(dim=1)
    lengths = ends[:, -1:]
    fused = int(lengths.max())
    positions = torch.arange(fused, device=input_ids.device).expand(len(input_ids), fused)
    if padding_side == "left":
        positions = positions - (fused - lengths)
    mask = (positions >= 0) & (positions < lengths)
    # The id a fused position comes from: the first whose end lies beyond the position.
    source = torch.searchsorted(ends, positions.contiguous(), right=True).clamp(max=input_ids.shape[1] - 1)
    expanded_ids = input_ids.gather(1, source).masked_fill(~mask, 0)
    expanded_labels = None
    if labels is not None:
        no_loss = ~mask | (expanded_ids == IMAGE_TOKEN_INDEX)
        expanded_labels = labels.gather(1, source).masked_fill(no_loss, IGNORE_INDEX)
    return Expanded(expanded_ids, mask.to(torch.long), expanded_labels)


def merge_features(input_ids: torch.Tensor, text_embeds: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    """Return embeddings ``(batch, fused, hidden)`` with image features written at the image positions, in order.

    Args:
        input_ids: ``(batch, fused)`` int64, expanded.
        text_embeds: ``(batch, fused, hidden)``; whatever stands at image positions is replaced.
        image_features: ``(num_images, num_patches, hidden)``; ``num_images`` may be 0.

    Raises:
        ValueError: If the ids hold another number of images than ``image_features``.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    num_images, num_patches, _ = image_features.shape
    num_placeholders = int(is_image.sum()) // num_patches
    if num_placeholders != num_images:
        raise ValueError(f"the prompt has {num_placeholders} image placeholders but {num_images} images were given")
    features = image_features.flatten(0, 1).to(device=text_embeds.device, dtype=text_embeds.dtype)
    return text_embeds.masked_scatter(is_image.unsqueeze(-1), features)


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return rotary positions ``(batch, fused)`` int64: the count of real tokens before; 1 at padding.

    Source: 01-ai/Yi, VL/llava/model/llava_arch.py (golden training batches).
    """
    return (attention_mask.cumsum(dim=1) - 1).masked_fill(attention_mask == 0, 1)


@dataclass(frozen=True)
class Packed:
    """Where the rows lie in one packed sequence of ``fused`` positions."""

    position_ids: torch.Tensor  # (1, fused) int64, from 0 in every row
    starts: torch.Tensor  # (num_rows,) int64, first position of each row
    lengths: list[int]  # positions of each row


def packed_layout(input_ids: torch.Tensor, row_lengths: torch.Tensor, num_patches: int) -> Packed:
    """Return the layout of rows that stand one after the other in a single sequence.

    Args:
        input_ids: ``(1, seq)`` int64, before the expansion.
        row_lengths: ``(num_rows,)`` int64, ids of each row; their sum is ``seq``.
        num_patches: Positions of one image.
    """
    widths = torch.where(input_ids[0] == IMAGE_TOKEN_INDEX, num_patches, 1)
    ends = widths.cumsum(0)[row_lengths.to(input_ids.device).cumsum(0) - 1]
    lengths = ends.diff(prepend=ends.new_zeros(1))
    starts = ends - lengths
    positions = torch.arange(int(ends[-1]), device=ends.device) - starts.repeat_interleave(lengths)
    return Packed(positions.unsqueeze(0), starts, lengths.tolist())
