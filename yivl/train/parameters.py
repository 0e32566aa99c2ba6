"""Trainable parameters, their learning rates, LoRA adapters and gradient checkpointing."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, cast, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from yivl.checkpoint.format import ADAPTER, published_name
from yivl.errors import YiVLError
from yivl.model.modeling import YiVLForCausalLM
from yivl.train.arguments import Arguments, ModelArguments, YiVLTrainingArguments

logger = logging.getLogger(__name__)

Part = Literal["vision_tower", "mm_projector", "language_model"]

_DECODER_LINEARS: Final = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def part_of(name: str) -> Part:
    """Return the part of the model that a parameter belongs to."""
    match = re.match(r"model\.(vision_tower|mm_projector)\.", published_name(name))
    return cast(Part, match[1]) if match else "language_model"


def set_up_model(model: YiVLForCausalLM, arguments: Arguments, base: str) -> tuple[Any, list["PartSize"]]:
    """Return a loaded model as the flags train it, with adapters of ``base`` if asked, and the sizes of its parts.

    Raises:
        YiVLError: If no parameter is trainable.
    """
    model_arguments, _, training = arguments
    prepared: Any = add_adapters(model, model_arguments, base) if model_arguments.lora_enable else model
    select_trainable(prepared, model_arguments, model.config.num_vision_layers)
    sizes = part_sizes(prepared, training)
    logger.info("%s", parameter_table(sizes))
    if not any(size.trainable for size in sizes):
        raise YiVLError("no parameter is trainable: the flags freeze every part of the model; drop one of them")
    if not training.deepspeed:
        upcast_trainable_params(prepared)
    language_model, vision_tower = training.gradient_checkpointing, training.vision_gradient_checkpointing
    enable_gradient_checkpointing(prepared, language_model=language_model, vision_tower=vision_tower)
    return prepared, sizes


def add_adapters(model: YiVLForCausalLM, arguments: ModelArguments, base: str) -> PeftModel:
    """Return the model with new LoRA adapters on the linear layers of the decoder and, if asked, of the ViT.

    ``base`` is the ``base_model_name_or_path`` of the adapter.
    """
    targets = _DECODER_LINEARS
    if arguments.lora_vision_tower:
        layers = model.get_vision_tower().vit.layers
        linears = "|".join(name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear))
        used = "|".join(str(index) for index in range(model.config.num_vision_layers))
        targets += rf"|model\.vision_tower\..*\.layers\.({used})\.({linears})"
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    for module in adapted.modules():
        # Autocast casts the input of an adapter; that peft casts it to float32 before would only add copies, which the
        # backward pass keeps for each of the linear layers. DoRA computes the norm of its weights in the same dtype.
        if isinstance(module, LoraLayer) and not arguments.use_dora:
            module.cast_input_dtype_enabled = False
    return adapted


def select_trainable(model: nn.Module, arguments: ModelArguments, num_vision_layers: int) -> None:
    """Set ``requires_grad`` of all parameters; those of the ViT after its ``num_vision_layers`` layers are not run."""
    is_trainable = {
        "vision_tower": arguments.unfreeze_mm_vision_tower,
        "mm_projector": not arguments.freeze_mm_mlp_adapter,
        "language_model": arguments.trains_language_model,
    }
    for name, parameter in model.named_parameters():
        vision_layer = re.search(r"\.encoder\.layers\.(\d+)\.", name)
        is_run = not (".post_layernorm." in name or (vision_layer and int(vision_layer[1]) >= num_vision_layers))
        is_trained = is_trainable[part_of(name)] and is_run and parameter.is_floating_point()
        parameter.requires_grad = ADAPTER in name or is_trained


def upcast_trainable_params(model: nn.Module) -> None:
    """Cast trainable parameters to float32, in place: the FP32 master weights of bf16 mixed precision.

    In 16 bits, small updates would be rounded away. DeepSpeed keeps its own FP32 master weights.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def learning_rate_of(part: Part, arguments: YiVLTrainingArguments) -> float:
    """Return the learning rate of a part of the model."""
    own = {"vision_tower": arguments.mm_vision_tower_lr, "mm_projector": arguments.mm_projector_lr}.get(part)
    return float(arguments.learning_rate if own is None else own)


def parameter_groups(
    model: nn.Module, arguments: YiVLTrainingArguments, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: each part of the model, with and without weight decay.

    ``decayed`` holds the names of the parameters with weight decay, by the rules of transformers, which know most norms
    by their names and miss others, such as ``norm1`` of InternViT. No norm has weight decay here.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, LlamaRMSNorm)}
    decayed = {name for name in decayed if name.rpartition(".")[0] not in norms}
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name), name in decayed].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate_of(part, arguments),
            "weight_decay": arguments.weight_decay if decays else 0.0,
        }
        # The learning rate of the first group is the one that is logged.
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0][0] != "language_model")
    ]


def keep_embedding_states(model: nn.Module) -> None:
    """Keep the states of embeddings in 32 bits under an 8-bit optimizer, as transformers does: they are less stable.

    DeepSpeed gives the optimizer other parameters, so that there all states have 8 bits.
    """
    from bitsandbytes.optim.optimizer import GlobalOptimManager  # slow to import, and only such optimizers need it

    manager = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
    manager.initialize()  # one for the process, which may have trained before
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


@dataclass(frozen=True)
class PartSize:
    """Number of parameters of a part of the model."""

    name: str
    parameters: int
    trainable: int
    learning_rate: float


def part_sizes(model: nn.Module, arguments: YiVLTrainingArguments) -> list[PartSize]:
    """Return the numbers of parameters, all and trainable, of each part and of its adapters."""
    counts: dict[tuple[Part, bool], list[int]] = {(part, False): [0, 0] for part in get_args(Part)}
    for name, parameter in model.named_parameters():
        count = counts.setdefault((part_of(name), ADAPTER in name), [0, 0])
        # Under ZeRO-3 the tensor is empty; in 4 bits, two values are packed into a byte.
        shape = getattr(parameter, "ds_shape", None) or getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = parameter.numel() if shape is None else torch.Size(shape).numel()
        count[0] += size
        count[1] += size * parameter.requires_grad
    return [
        PartSize(f"{part} adapters" if is_adapter else part, size, trainable, learning_rate_of(part, arguments))
        for (part, is_adapter), (size, trainable) in counts.items()
    ]


def parameter_table(sizes: Iterable[PartSize]) -> str:
    """Return the table that is logged before training."""
    lines = [f"{'part':<24}{'parameters':>16}{'trainable':>16}  learning rate"]
    for size in sizes:
        rate = f"{size.learning_rate:g}" if size.trainable else "frozen"
        lines.append(f"{size.name:<24}{size.parameters:>16,}{size.trainable:>16,}  {rate}")
    return "\n".join(lines)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules whose parameters are all frozen."""
    frozen: list[nn.Module] = []
    for child in model.children():
        flags = [parameter.requires_grad for parameter in child.parameters()]
        frozen += [child] if flags and not any(flags) else frozen_modules(child)
    return frozen


def freeze_modes(frozen: Iterable[nn.Module]) -> None:
    """Put frozen modules into eval mode, after ``model.train()``.

    Decoder layers stay in training mode, only their submodules change: transformers applies gradient checkpointing to
    a layer only in training mode, and the gradient of the projector passes through a frozen decoder.
    """
    for module in frozen:
        module.eval()
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


def enable_gradient_checkpointing(model: nn.Module, *, language_model: bool, vision_tower: bool) -> None:
    """Enable or disable gradient checkpointing of the layers of each part; transformers offers all or none."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = vision_tower if ".vision_tower." in name else language_model
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
