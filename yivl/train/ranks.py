"""Work that one rank does for all of them, and what all of them know."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from yivl.errors import YiVLError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks; 1 before the process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if world_size() > 1 else 0


def on_rank_0(work: Callable[[], T]) -> T:
    """Return what ``work`` returns on rank 0, on all ranks; if it fails, all of them end.

    Raises:
        YiVLError: If ``work`` does; on one rank of every node, so that the message is shown once.
        SystemExit: On the other ranks, with the exit code of rank 0.
    """
    outcome: list[tuple[T | None, str | None, int]] = [(None, None, 0)]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            outcome = [(work(), None, 0)]
        except BaseException as error:  # also an interrupt: the other ranks wait
            failure = error
            is_wrong_input = isinstance(error, YiVLError)
            outcome = [(None, str(error) if is_wrong_input else None, 2 if is_wrong_input else 1)]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    result, message, exit_code = outcome[0]
    if failure is None and message is not None:
        end_all_ranks(YiVLError(message))
    if exit_code:
        leave_group()
    if failure is not None:
        raise failure
    if exit_code:
        sys.exit(exit_code)
    return result  # type: ignore[return-value]


def end_all_ranks(error: YiVLError) -> NoReturn:
    """Raise an error that all ranks have found; call it on all of them.

    Raises:
        YiVLError: ``error``, on one rank of every node, so that the message is shown once.
        SystemExit: On the other ranks, with its exit code.
    """
    is_alone = world_size() == 1
    leave_group()
    if is_alone or os.environ.get("LOCAL_RANK", "0") == "0":
        raise error
    sys.exit(2)


def leave_group() -> None:
    """Destroy the process group, after the last rank is done; call it on all ranks.

    Threads of gloo that outlive it can abort a finished process ("terminate called without an active exception").
    """
    if dist.is_available() and dist.is_initialized():
        # The current device is named, or PyTorch warns that it chooses it.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()


def of_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
