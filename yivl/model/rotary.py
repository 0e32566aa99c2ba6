"""The rotary frequencies of the decoder, kept exact."""

from collections.abc import Callable

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class ExactRotaryEmbedding(LlamaRotaryEmbedding):  # type: ignore[misc]
    """Keeps its frequencies in float32 when the model is cast.

    Callers cast the whole model after loading, ``model.to(dtype=torch.bfloat16)``. transformers 4 had its cosines
    computed by then; version 5 computes them from the frequencies, which in bfloat16 are off by up to 0.4 %: with the
    released shapes that is one radian at position 1,100, where the question after a picture stands.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ExactRotaryEmbedding":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in exact.items():
            cast = getattr(self, name)
            if cast.dtype != frequencies.dtype:
                setattr(self, name, frequencies.to(cast.device))
        return self
