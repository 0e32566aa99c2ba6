"""Next-token cross-entropy loss that computes logits only at supervised positions."""

from typing import Any, Final

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from yivl.constants import IGNORE_INDEX
from yivl.model.sharding import is_sharded

CHUNK_SIZE: Final = 2048
"""Supervised positions whose logits are in memory at once: 2,048 x 64,000 logits in bfloat16 are 0.26 GB, and their
gradient as much; in float32 twice that. Source: ours."""

BLOCK_SIZE: Final = 32
"""Rows of logits in float32 at once: 32 x 64,000 are 8 MB, which stay in a CPU's cache. Source: ours."""


def supervised_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of the next tokens, a float32 scalar.

    Args:
        hidden_states: ``(batch, seq, hidden)``, after the final norm.
        labels: ``(batch, seq)`` int64 aligned with the positions (not shifted); no loss at ``IGNORE_INDEX``.
        lm_head: Maps ``(n, hidden)`` to ``(n, vocabulary)``, one chunk at a time.
        num_items_in_batch: Supervised tokens of the optimizer step, the divisor of the summed loss; ``None`` divides
            by the supervised tokens of ``labels``.
    """
    targets = labels[:, 1:].to(hidden_states.device)  # layers may be spread over devices
    is_supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[:, :-1][is_supervised], targets[is_supervised]

    def chunk_loss(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(chunk)
        return cross_entropy_sum(logits, chunk_targets.to(logits.device))

    # At least one (possibly empty) chunk keeps the loss in the autograd graph. The last chunk is not checkpointed: the
    # backward pass starts with it and re-computes the others only afterwards.
    num_chunks = _num_chunks(len(targets), hidden_states.device, is_sharded(lm_head))
    *recomputed, kept = range(0, num_chunks * CHUNK_SIZE, CHUNK_SIZE)
    losses = [
        checkpoint(chunk_loss, hidden_states[i : i + CHUNK_SIZE], targets[i : i + CHUNK_SIZE], use_reentrant=False)
        for i in recomputed
    ]
    total = torch.stack([*losses, chunk_loss(hidden_states[kept:], targets[kept:])]).sum()
    return total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies of ``(n, vocabulary)`` logits and ``(n,)`` classes, a float32 scalar.

    It equals ``torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")``, which holds the logits
    and two intermediate results of their size in float32; here float32 is a few rows at a time.
    """
    loss: torch.Tensor = _CrossEntropySum.apply(logits, targets)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        normalizers = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            normalizers[rows] = logits[rows].float().logsumexp(1, keepdim=True)
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - logits.gather(1, targets[:, None])).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for start in range(0, len(logits), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            block = logits[rows].float().sub_(normalizers[rows]).exp_()
            block.scatter_add_(1, targets[rows, None], block.new_full((len(block), 1), -1.0))
            grad[rows] = block.mul_(grads[0])
        return grad, None


def _num_chunks(num_targets: int, device: torch.device, sharded: bool) -> int:
    """Return the number of calls of ``lm_head``, on all ranks the same where its weights are sharded."""
    count = torch.tensor(max(-(-num_targets // CHUNK_SIZE), 1), device=device)
    if sharded:
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return int(count)
