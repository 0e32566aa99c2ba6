"""Samples to one batch: padded on the right, or packed into one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from yivl.constants import IGNORE_INDEX
from yivl.data.encoding import Sample
from yivl.image_processing import ImageProcessor


@dataclass(frozen=True)
class Collator:
    """Makes one batch of samples; ``None``, a skipped row, is dropped.

    If nothing is left, the batch is a dummy batch of two tokens without labels: every rank must take part in each step.
    """

    pad_token_id: int
    packing: bool = False
    """Concatenate the samples, which do not attend to each other, instead of padding them."""

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Any]:
        """Return ``images``, ``input_ids``, ``labels`` and ``attention_mask`` (batch, seq) or ``row_lengths`` (batch,).

        ``images`` is ``(num_images, image_size, image_size, 3)`` uint8 in placeholder order, ``None`` without images.
        """
        rows = [sample for sample in samples if sample is not None]
        if not rows:
            ids = torch.full((2,), self.pad_token_id)
            rows = [Sample(ids, torch.full_like(ids, IGNORE_INDEX), torch.zeros(0, dtype=torch.uint8), 2)]
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        images = [row.pixels for row in rows if len(row.pixels)]
        token_ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
        batch: dict[str, Any] = {"images": torch.cat(images) if images else None}
        if self.packing:
            packed = {"input_ids": torch.cat(token_ids).unsqueeze(0), "labels": torch.cat(labels).unsqueeze(0)}
            return batch | packed | {"row_lengths": lengths}
        batch["input_ids"] = pad_sequence(token_ids, batch_first=True, padding_value=self.pad_token_id)
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        # From the lengths and not from pad_token_id, which may also be a real token.
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def normalize_images(batch: dict[str, Any], image_processor: ImageProcessor) -> dict[str, Any]:
    """Return a batch of ``Collator`` with the ``pixel_values`` of its images, as the model takes them."""
    images = batch["images"]
    return batch if images is None else batch | {"images": image_processor.normalize(images)}
