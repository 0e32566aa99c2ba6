"""Parameters that ZeRO-3 keeps in parts, one on each process: how to read, write and make them."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config


def gathered(parameters: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Within the block the parameters are whole on every process; what process 0 writes into them is kept."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # slow to import, and only ZeRO-3 needs it

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return context


def partitioned() -> AbstractContextManager[None]:
    """Modules built within the block are partitioned where ZeRO-3 is on."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # as above

    context: AbstractContextManager[None] = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    return context
