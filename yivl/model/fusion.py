"""Fusion of text and image features: every ``-200`` becomes ``num_patches`` positions. Pure functions, no loops.

Shapes: ``batch`` rows, ``seq`` ids before and ``fused`` positions after the expansion.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Expanded:
    """Ids, mask and labels after the expansion, each ``(batch, fused)``."""

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
    """Return rows in which every ``-200`` has ``num_patches`` positions, padded on ``padding_side``.

    Padding of the input, anywhere in a row, is removed first.

    Args:
        input_ids: ``(batch, seq)`` int64.
        num_patches: Positions per image.
        attention_mask: ``(batch, seq)``, 0 at padding; ``None`` means no padding.
        labels: ``(batch, seq)`` int64, or ``None``.
        padding_side: Side on which shorter rows are padded.
    """
    is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.long)
    # Number of fused positions of each id, and the end of them in its row.
    widths = torch.where(input_ids == IMAGE_TOKEN_INDEX, num_patches, 1) * is_real
    ends = widths.cumsum(dim=1)
    lengths = ends[:, -1:]
    fused = int(lengths.max())
    positions = torch.arange(fused, device=input_ids.device).expand(len(input_ids), fused)
    if padding_side == "left":
        positions = positions - (fused - lengths)
    mask = (positions >= 0) & (positions < lengths)
    # The source of a fused position is the first id that ends after it.
    source = torch.searchsorted(ends, positions.contiguous(), right=True).clamp(max=input_ids.shape[1] - 1)
    expanded_ids = input_ids.gather(1, source).masked_fill(~mask, 0)
    expanded_labels = None
    if labels is not None:
        no_loss = ~mask | (expanded_ids == IMAGE_TOKEN_INDEX)
        expanded_labels = labels.gather(1, source).masked_fill(no_loss, IGNORE_INDEX)
    return Expanded(expanded_ids, mask.to(torch.long), expanded_labels)


def collapse_image_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, token: int, num_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask in which ``num_patches`` image tokens are one ``-200``, and the others of them padding.

    Args:
        input_ids: ``(batch, seq)`` int64, whose shape stays.
        attention_mask: ``(batch, seq)``, 0 at padding; ``None`` means no padding.
        token: Id of an image token.
        num_patches: Image tokens of an image, next to each other.

    Raises:
        ValueError: If image tokens do not come in groups of ``num_patches``.
    """
    is_image = input_ids == token
    is_first = is_image & ((is_image.cumsum(dim=1) - 1) % num_patches == 0)
    is_rest = is_image & ~is_first
    if (is_image.sum(dim=1) % num_patches).any() or (is_rest[:, 1:] & ~is_image[:, :-1]).any():
        raise ValueError(f"the image tokens in input_ids are not in groups of {num_patches}, one for each image")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return input_ids.masked_fill(is_first, IMAGE_TOKEN_INDEX), mask.masked_fill(is_rest, 0)


def merge_features(input_ids: torch.Tensor, text_embeds: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    """Return embeddings ``(batch, fused, hidden)`` with image features written at the image positions, in order.

    Args:
        input_ids: ``(batch, fused)`` int64, expanded.
        text_embeds: ``(batch, fused, hidden)``; values at image positions are replaced.
        image_features: ``(num_images, num_patches, hidden)``; ``num_images`` may be 0.

    Raises:
        ValueError: If the ids and ``image_features`` differ in the number of images.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    num_images, num_patches, _ = image_features.shape
    num_placeholders = int(is_image.sum()) // num_patches
    if num_placeholders != num_images:
        raise ValueError(f"the prompt has {num_placeholders} image placeholders but {num_images} images were given")
    features = image_features.flatten(0, 1).to(device=text_embeds.device, dtype=text_embeds.dtype)
    return text_embeds.masked_scatter(is_image.unsqueeze(-1), features)


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return rotary positions ``(batch, fused)`` int64: the number of preceding real tokens; 1 at padding.

    Source: 01-ai/Yi, VL/llava/model/llava_arch.py (golden training batches).
    """
    return (attention_mask.cumsum(dim=1) - 1).masked_fill(attention_mask == 0, 1)


@dataclass(frozen=True)
class Fused:
    """Input of the decoder; shapes as in ``Expanded``."""

    inputs_embeds: torch.Tensor  # (batch, fused, hidden)
    attention_mask: torch.Tensor | None
    """``None`` for packed rows, which have no padding."""
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    packed_lengths: list[int] | None = None
    """Sequence length of each packed row; ``None`` if rows are not packed."""

    @classmethod
    def from_rows(cls, inputs_embeds: torch.Tensor, expanded: Expanded) -> "Fused":
        """Return padded rows."""
        position_ids = position_ids_from_mask(expanded.attention_mask)
        return cls(inputs_embeds, expanded.attention_mask, position_ids, expanded.labels)

    @classmethod
    def from_packed(
        cls,
        inputs_embeds: torch.Tensor,
        expanded: Expanded,
        input_ids: torch.Tensor,
        row_lengths: torch.Tensor,
        num_patches: int,
    ) -> "Fused":
        """Return rows that are packed into a single sequence; positions start at 0 in every row.

        Args:
            inputs_embeds: ``(1, fused, hidden)``.
            expanded: Ids and labels after the expansion.
            input_ids: ``(1, seq)`` int64, before the expansion.
            row_lengths: ``(num_rows,)`` int64, ids of each row; their sum is ``seq``.
            num_patches: Positions per image.
        """
        widths = torch.where(input_ids[0] == IMAGE_TOKEN_INDEX, num_patches, 1)
        ends = widths.cumsum(0)[row_lengths.to(input_ids.device).cumsum(0) - 1]
        lengths = ends.diff(prepend=ends.new_zeros(1))
        starts = ends - lengths
        positions = torch.arange(int(ends[-1]), device=ends.device) - starts.repeat_interleave(lengths)
        if expanded.labels is not None:
            expanded.labels[0, starts] = IGNORE_INDEX  # the end of a row does not predict the start of the next one
        return cls(inputs_embeds, None, positions.unsqueeze(0), expanded.labels, lengths.tolist())

    def packed_kwargs(self) -> dict[str, Any]:
        """Return the decoder's arguments that keep packed rows apart, those of FlashAttention included."""
        if self.packed_lengths is None:
            return {}
        ends = torch.tensor([0, *self.packed_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends, longest = ends.to(self.inputs_embeds.device), max(self.packed_lengths)
        flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {"packed_lengths": self.packed_lengths, "use_cache": False} | flash


def cover_cache(attention_mask: torch.Tensor | None, cache: Any) -> torch.Tensor | None:
    """Return the mask of a one-token step; it may be too short, as LLaVA counts an image as one position."""
    if attention_mask is None or attention_mask.ndim != 2 or cache.is_compileable:  # static shapes: complete already
        return attention_mask
    missing = cache.get_seq_length() + 1 - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (max(missing, 0), 0), value=1)
