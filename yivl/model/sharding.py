"""Weights that are sharded across the ranks of a run, by ZeRO-3 or FSDP2, and gathered module by module."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config


def is_sharded(module: nn.Module) -> bool:
    """Return whether all ranks must run a module equally often, since each call gathers its weights from all of them.

    ZeRO-3 shards all modules, FSDP2 those that ``fully_shard`` was called on.
    """
    return is_deepspeed_zero3_enabled() or isinstance(module, FSDPModule)


def gathered(parameters: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Gather parameters that ZeRO-3 partitions; writes of rank 0 inside the block are kept."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # slow to import, and only ZeRO-3 needs it

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return context


def partitioned() -> AbstractContextManager[None]:
    """Partition the parameters of modules built inside the block where ZeRO-3 is on."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # as above

    context: AbstractContextManager[None] = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    return context


def new_parameter(value: torch.Tensor) -> nn.Parameter:
    """Return a parameter with the value that rank 0 gives, partitioned under ZeRO-3."""
    with nullcontext() if value.is_meta else partitioned():  # a dry run has nothing to partition
        # ZeRO-3 partitions the parameters of a module after its constructor.
        [parameter] = nn.ParameterList([torch.empty_like(value)]).parameters()
    with gathered([parameter]), torch.no_grad():
        parameter.copy_(value)
    return parameter
