"""The batch sizes of a run: micro-batch, accumulation and global batch size, any two of which give the third."""

from yivl.errors import YiVLError
from yivl.train.arguments import YiVLTrainingArguments
from yivl.train.layers import TYPED

_MICRO, _ACCUMULATION, _GLOBAL = "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"


def split_batch(training: YiVLTrainingArguments, world_size: int) -> tuple[int, int]:
    """Return the micro-batch size and the accumulation steps.

    Of three values that disagree, the one of the lowest rank (``Origin``) gives way. Where only a global batch size was
    chosen, the default micro-batch shrinks to a size that divides it.

    Raises:
        YiVLError: If values of the same rank contradict each other, or one is no multiple of the others.
    """
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    total = training.global_batch_size
    micro_rank, accumulation_rank, total_rank = (_rank(training, name) for name in (_MICRO, _ACCUMULATION, _GLOBAL))
    if total is None:
        return micro, accumulation
    if micro_rank == accumulation_rank == total_rank and total != micro * accumulation * world_size:
        raise YiVLError(
            f"{_named(training, _GLOBAL)} is not {micro * accumulation * world_size}, {_named(training, _MICRO)} x "
            f"{_named(training, _ACCUMULATION)} x {_processes(world_size)}; drop one of the three"
        )
    if total_rank < accumulation_rank and total_rank <= micro_rank:
        return micro, accumulation
    if micro_rank < accumulation_rank:
        return _divide(training, total, accumulation, world_size, _ACCUMULATION), accumulation
    if micro_rank < total_rank and total % world_size == 0:
        samples = total // world_size
        micro = max(size for size in range(1, min(micro, samples) + 1) if samples % size == 0)
    return micro, _divide(training, total, micro, world_size, _MICRO)


def _divide(training: YiVLTrainingArguments, total: int, size: int, world_size: int, name: str) -> int:
    quotient, rest = divmod(total, size * world_size)
    if rest or not quotient:
        raise YiVLError(
            f"{_named(training, _GLOBAL)} is no multiple of {size * world_size}, {_named(training, name)} x "
            f"{_processes(world_size)}"
        )
    return quotient


def _rank(training: YiVLTrainingArguments, name: str) -> int:
    return training.origins[name].rank if name in training.origins else -1


def _named(training: YiVLTrainingArguments, name: str) -> str:
    """Return a flag with its value, and where the value comes from unless it was typed."""
    origin = f"from {training.origins[name].name}" if name in training.origins else "the default"
    return f"--{name} {getattr(training, name)}" + ("" if origin == f"from {TYPED}" else f" ({origin})")


def _processes(world_size: int) -> str:
    return f"{world_size} process{'es' if world_size > 1 else ''}"
