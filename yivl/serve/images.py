"""Images of requests, and the vision features of recent ones."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from yivl.image_processing import ImageProcessor, load_image
from yivl.inference.request import EncodedImage
from yivl.model.modeling import YiVLForCausalLM
from yivl.serve.limits import Limits


@dataclass(frozen=True)
class SentImage:
    """An image of a request, preprocessed; the decoded file is not kept."""

    pixel_values: torch.Tensor = field(compare=False)
    """``(3, image_size, image_size)``."""
    digest: bytes
    """SHA-256 of the file, by which images are equal."""


class ImageReader:
    """Decodes and preprocesses image files for several threads, at most ``max_decoding`` files at a time.

    So the memory is that of a few decoded images, however many requests arrive at once.
    """

    def __init__(self, limits: Limits, image_processor: ImageProcessor) -> None:
        self._max_pixels = limits.max_image_pixels
        self._image_processor = image_processor
        self._places = threading.BoundedSemaphore(limits.max_decoding)

    def read(self, data: bytes) -> SentImage:
        """Return the image of a file.

        Raises:
            ImageError: If it cannot be used.
        """
        with self._places:
            image = load_image(data, max_pixels=self._max_pixels)
            return SentImage(self._image_processor([image])[0], hashlib.sha256(data).digest())


class ImageEncoder:
    """Encodes images and keeps the features of recent ones; images that are equal while kept share one serial.

    Args:
        model: The model.
        max_images: Number of images kept; the least recently used are dropped first.
    """

    def __init__(self, model: YiVLForCausalLM, max_images: int) -> None:
        self._model = model
        self._max_images = max_images
        self._encoded: OrderedDict[SentImage, EncodedImage] = OrderedDict()

    def find(self, image: SentImage) -> EncodedImage | None:
        """Return the features of an image that was encoded recently."""
        if image in self._encoded:
            self._encoded.move_to_end(image)
        return self._encoded.get(image)

    @torch.inference_mode()
    def encode(self, images: Sequence[SentImage]) -> list[EncodedImage]:
        """Return the features of each image; those that are not kept are encoded in one batch, equal ones once."""
        encoded = {image: found for image in images if (found := self.find(image))}
        if new := [image for image in dict.fromkeys(images) if image not in encoded]:
            features = self._model.encode_images([image.pixel_values for image in new])
            # Copies, not views, which would keep the memory of the batch alive until all of its images are dropped.
            encoded |= {image: EncodedImage(row.clone()) for image, row in zip(new, features, strict=True)}
        self._encoded |= encoded
        while len(self._encoded) > self._max_images:
            self._encoded.popitem(last=False)
        return [encoded[image] for image in images]
