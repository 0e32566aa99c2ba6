"""Work that one rank does for all of them."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import TrainingArguments

from yivl.errors import YiVLError

T = TypeVar("T")


def on_rank_0(args: TrainingArguments, work: Callable[[], T]) -> T:
    """Return what ``work`` returns on rank 0, on all ranks; if it fails, all of them end.

    Raises:
        YiVLError: If ``work`` does; on one rank of every node, so that the message is shown once.
        SystemExit: On the other ranks, with the exit code of rank 0.
    """
    outcome: list[tuple[T | None, str | None, int]] = [(None, None, 0)]
    failure: BaseException | None = None
    if args.process_index == 0:
        try:
            outcome = [(work(), None, 0)]
        except BaseException as error:  # also an interrupt: the other ranks wait
            failure = error
            is_wrong_input = isinstance(error, YiVLError)
            outcome = [(None, str(error) if is_wrong_input else None, 2 if is_wrong_input else 1)]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    result, message, exit_code = outcome[0]
    if message is not None and args.local_process_index == 0:
        raise YiVLError(message)
    if exit_code:
        sys.exit(exit_code)
    return result  # type: ignore[return-value]
