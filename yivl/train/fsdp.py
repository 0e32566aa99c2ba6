"""FSDP2 of accelerate where its defaults do not fit: on CPUs, in bfloat16, and for checkpoints that hold the model."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_fsdp(accelerator: Accelerator, args: TrainingArguments, model: nn.Module) -> None:
    """Let an accelerator shard the model that it prepares, also on CPUs, where accelerate would ignore ``--fsdp``.

    The layers of the decoder and the ViT are gathered one at a time. accelerate adds the embeddings, the head with the
    norm before it, and the rest: the projector and the ends of the ViT.

    Under bf16 mixed precision, weights are gathered in bfloat16, and gradients are reduced in float32; accelerate would
    reduce them in bfloat16 and round the loss to it.
    """
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    units = ",".join(sorted(layers))
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args, transformer_cls_names_to_wrap=units)
    if args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    accelerator.state.fsdp_plugin = plugin
    # accelerate copies the second to the first whenever it reads its state.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def save_optimizer(accelerator: Accelerator, optimizer: Any, model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the whole optimizer state from rank 0, for any number of ranks to resume from; all ranks must call it.

    transformers would write a second copy of the model, too.
    """
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, os.fspath(folder))


def without_padding(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return gathered weights without the padding behind those that do not divide evenly among the ranks.

    safetensors refuses tensors that are parts of a storage.
    """
    return {
        key: value if value.nbytes == value.untyped_storage().nbytes() else value.clone()
        for key, value in state_dict.items()
    }
