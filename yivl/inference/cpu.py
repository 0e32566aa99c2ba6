"""What makes one-token steps on a CPU run at the speed of the memory. Numbers stay the same; docs/benchmarks.md."""

import threading
from typing import Final

import torch


class _NativeKernels:
    """Switches oneDNN off while anyone is inside; the switch is one per process, so the users are counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before = True

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = bool(torch.backends.mkldnn.enabled)
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                torch.backends.mkldnn.enabled = self.before  # type: ignore[assignment]


native_matrix_vector: Final = _NativeKernels()
"""Multiplies matrix and vector with PyTorch's own kernels instead of oneDNN's.

oneDNN's bfloat16 kernels are made for matrices: with a single row they reach two thirds of the memory bandwidth, the
native ones nearly all of it. Another thread that multiplies matrices meanwhile gets the right numbers, only slower.
"""


def explicit_mask(attention_mask: torch.Tensor | None, num_rows: int, num_keys: int) -> torch.Tensor:
    """Return the mask of a one-token step, ``(batch, 1, 1, num_keys)`` bool.

    Given a mask, even one that hides nothing, transformers hands the query heads of a group to attention as rows of
    one matrix and each key is read once; without a mask they go as separate heads, ten times slower on a CPU.

    Args:
        attention_mask: ``(batch, num_keys)``, a mask already in the form of the decoder, or ``None``: nothing hidden.
        num_rows: The batch.
        num_keys: Cached positions plus the one of this step.
    """
    if attention_mask is None:
        return torch.ones(num_rows, 1, 1, num_keys, dtype=torch.bool)
    return attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None, :].to(torch.bool)
