"""Rows to examples, examples to batches: the pixels, prompt and targets of training are those of inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, SYSTEM_PROMPT
from yivl.data.rows import Row, RowError
from yivl.errors import ImageError
from yivl.image_processing import ImageProcessor, load_image
from yivl.tokenization import YiTokenizer, encode_turns


@dataclass(frozen=True)
class Example:
    """One tokenized row."""

    input_ids: torch.Tensor  # (seq,) int64, IMAGE_TOKEN_INDEX at image slots
    labels: torch.Tensor  # (seq,) int64, IGNORE_INDEX where no loss is taken
    pixel_values: torch.Tensor  # (num_images, 3, image_size, image_size) float32, normalized
    num_positions: int
    """Length in the decoder: every image slot counts its patches."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples of at most ``max_length`` positions."""

    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    num_patches: int
    """Positions one image takes in the decoder."""
    max_length: int
    """In positions, counted after the images are expanded."""
    system: str = SYSTEM_PROMPT

    def __call__(self, row: Row) -> Example:
        """Return the example of a row, cut on the right where it is too long, never through a picture.

        Raises:
            RowError: If a picture cannot be used, or no target is left after the cut.
        """
        encoded = encode_turns(row.turns, self.tokenizer, self.system)
        kept = self._kept(encoded.input_ids)
        input_ids = torch.tensor(encoded.input_ids[:kept])
        labels = input_ids.masked_fill(~torch.tensor(encoded.is_target[:kept], dtype=torch.bool), IGNORE_INDEX)
        if not (labels[1:] != IGNORE_INDEX).any():
            raise RowError(f"{row.origin}: no answer left within {self.max_length} positions")
        num_images = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        try:
            images = [load_image(image) for image in row.images[:num_images]]
        except ImageError as error:
            raise RowError(f"{row.origin}: {error}") from error
        size = self.image_processor.clip_processor.crop_size["height"]
        pixel_values = self.image_processor(images) if images else torch.zeros(0, 3, size, size)
        return Example(input_ids, labels, pixel_values, kept + num_images * (self.num_patches - 1))

    def _kept(self, input_ids: Sequence[int]) -> int:
        """Return how many ids fit; a picture that would be cut is left out with all that follows."""
        used = 0
        for index, token in enumerate(input_ids):
            used += self.num_patches if token == IMAGE_TOKEN_INDEX else 1
            if used > self.max_length:
                return index
        return len(input_ids)


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right and stacks them.

    The attention mask comes from lengths, not from the pad id, which may also be a real token.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels``, ``attention_mask`` (batch, seq) and ``images`` in slot order.

        ``images`` is ``(num_images, 3, image_size, image_size)``, or ``None`` if no row has one.
        """
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        input_ids = pad_sequence(
            [example.input_ids for example in examples], batch_first=True, padding_value=self.pad_token_id
        )
        images = torch.cat([example.pixel_values for example in examples])
        return {
            "input_ids": input_ids,
            "labels": pad_sequence(
                [example.labels for example in examples], batch_first=True, padding_value=IGNORE_INDEX
            ),
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "images": images if len(images) else None,
        }
