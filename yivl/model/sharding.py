"""Weights that are sharded across the ranks of a run, by ZeRO-3 or FSDP2, and gathered module by module."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled


def is_sharded(module: nn.Module) -> bool:
    """Return whether all ranks must run a module equally often, since each call gathers its weights from all of them.

    ZeRO-3 shards all modules, FSDP2 those that ``fully_shard`` was called on.
    """
    return is_deepspeed_zero3_enabled() or isinstance(module, FSDPModule)
