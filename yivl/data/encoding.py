"""Rows to samples: token ids, labels and pixel values, made by the code that inference uses."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers

from yivl.checkpoint.loading import load_processors
from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.conversation import PromptTemplate
from yivl.data.rows import Row, RowError
from yivl.errors import ImageError
from yivl.image_processing import ImageProcessor, load_image
from yivl.tokenization import EncodedTurns, YiTokenizer, encode_turns, tokenize


@dataclass(frozen=True)
class Sample:
    """One tokenized row."""

    input_ids: torch.Tensor  # (seq,) int64, IMAGE_TOKEN_INDEX at image placeholders
    labels: torch.Tensor  # (seq,) int64, IGNORE_INDEX where no loss is computed
    pixels: torch.Tensor  # (num_images, image_size, image_size, 3) uint8, of ImageProcessor.resize
    sequence_length: int
    """Length in the decoder, image patches included."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples."""

    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    num_patches: int
    """Sequence length of one image in the decoder."""
    max_length: int
    """Maximum sequence length, image patches included."""
    template: PromptTemplate

    def __call__(self, row: Row) -> Sample:
        """Return the sample of a row, truncated to ``max_length``, never inside an image.

        Raises:
            RowError: If an image cannot be read, or truncation leaves no token to compute the loss on.
        """
        encoded = self.encode_text(row)
        kept, sequence_length = self._truncate(encoded.input_ids)
        input_ids = torch.tensor(encoded.input_ids[:kept])
        labels = input_ids.masked_fill(~torch.tensor(encoded.is_target[:kept], dtype=torch.bool), IGNORE_INDEX)
        if not (labels[1:] != IGNORE_INDEX).any():
            raise RowError(f"{row.origin}: no answer within the maximum sequence length of {self.max_length}")
        try:
            images = [load_image(image) for image in row.images[: int((input_ids == IMAGE_TOKEN_INDEX).sum())]]
        except ImageError as error:
            raise RowError(f"{row.origin}: {error}") from error
        return Sample(input_ids, labels, self.image_processor.resize(images), sequence_length)

    @property
    def fingerprint(self) -> str:
        """Hash of all that sequence lengths depend on: tokenizer, prompt template, size of images, maximum length."""
        facts = f"{self.num_patches} {self.max_length} {transformers.__version__} {self.template}"
        digest = hashlib.sha256(facts.encode())
        for name, content in sorted(self.tokenizer.files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def encode_text(self, row: Row) -> EncodedTurns:
        """Return the ids of a row, not truncated, and the tokens the loss is computed on."""
        return encode_turns(row.turns, self.tokenizer, self.template, row.system, row.questions)

    def sequence_length(self, row: Row) -> int:
        """Return the sequence length of a row, truncated as in its sample, without reading an image."""
        pieces = self.template.render(self.template.messages(row.turns, row.questions), row.system)
        return self._truncate(tokenize(pieces, self.tokenizer))[1]

    def _truncate(self, input_ids: Sequence[int]) -> tuple[int, int]:
        """Return how many ids fit in ``max_length``, never part of an image, and their sequence length."""
        length = 0
        for index, token in enumerate(input_ids):
            width = self.num_patches if token == IMAGE_TOKEN_INDEX else 1
            if length + width > self.max_length:
                return index, length
            length += width
        return len(input_ids), length


def load_encoder(model_path: str, model_base: str | None = None, *, max_length: int) -> Encoder:
    """Return the encoder of a checkpoint folder, hub id or LoRA adapter, without loading weights."""
    config, tokenizer, image_processor = load_processors(model_path, model_base)
    # From the image processor: an adapter may have been trained with another image size than its base.
    num_patches = config.num_patches_at(image_processor.image_size)
    return Encoder(tokenizer, image_processor, num_patches, max_length, config.prompt_template)


def encode_or_skip(row: Row | RowError, encoder: Encoder, on_bad_row: Callable[[RowError], None]) -> Sample | None:
    """Return the sample of a row; for an invalid row call ``on_bad_row``, which may raise, and return ``None``."""
    try:
        if isinstance(row, RowError):
            raise row
        return encoder(row)
    except RowError as error:
        on_bad_row(error)
        return None
