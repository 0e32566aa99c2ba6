"""Rows to examples, examples to batches: the pixels, prompt and targets of training are those of inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, SYSTEM_PROMPT
from yivl.conversation import render_chunks
from yivl.data.rows import Row, RowError
from yivl.errors import ImageError
from yivl.image_processing import ImageProcessor, load_image
from yivl.tokenization import YiTokenizer, encode_turns, tokenize_chunks


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
        size = self.image_processor.image_size
        pixel_values = self.image_processor(images) if images else torch.zeros(0, 3, size, size)
        return Example(input_ids, labels, pixel_values, kept + num_images * (self.num_patches - 1))

    def num_positions(self, row: Row) -> int:
        """Return the length of a row in the decoder, before any picture is read."""
        messages = [message for turn in row.turns for message in turn.messages()]
        input_ids = tokenize_chunks(render_chunks(messages, self.system), self.tokenizer)
        kept = self._kept(input_ids)
        return kept + input_ids[:kept].count(IMAGE_TOKEN_INDEX) * (self.num_patches - 1)

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
    """Makes one batch of examples; those that are ``None`` (bad rows) are left out.

    A batch of which nothing is left becomes two ids without a target: the processes of a run must keep in step.
    """

    pad_token_id: int
    packing: bool = False
    """One sequence without padding, of rows that do not see each other, instead of one row each."""

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels``, ``images`` and ``attention_mask`` (batch, seq), or ``row_lengths`` (rows,).

        ``images`` is ``(num_images, 3, image_size, image_size)`` in slot order, or ``None`` if no row has one.
        """
        rows = [example for example in examples if example is not None] or [_nothing(self.pad_token_id)]
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        images = torch.cat([row.pixel_values for row in rows if len(row.pixel_values)] or [torch.zeros(0)])
        batch: dict[str, Any] = {"images": images if len(images) else None}
        if self.packing:
            batch["input_ids"] = torch.cat([row.input_ids for row in rows]).unsqueeze(0)
            batch["labels"] = torch.cat([row.labels for row in rows]).unsqueeze(0)
            return batch | {"row_lengths": lengths}
        batch["input_ids"] = pad_sequence(
            [row.input_ids for row in rows], batch_first=True, padding_value=self.pad_token_id
        )
        batch["labels"] = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
        # From lengths, not from the pad id, which may also be a real token.
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch


def _nothing(pad_token_id: int) -> Example:
    ids = torch.full((2,), pad_token_id)
    return Example(ids, torch.full_like(ids, IGNORE_INDEX), torch.zeros(0), 2)
