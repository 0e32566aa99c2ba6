"""Which parameters train, at which rate, and how the frozen ones are kept out of the way."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from yivl.checkpoint.format import ADAPTER, published_name
from yivl.model.modeling import YiVLForCausalLM
from yivl.train.arguments import ModelArguments, YiVLTrainingArguments

Part = Literal["vision_tower", "mm_projector", "language_model"]

_DECODER_LINEARS: Final = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_VIT_LINEARS: Final = r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]"


def part_of(name: str) -> Part:
    """Return the part of the model a parameter belongs to."""
    parts: tuple[Part, ...] = ("vision_tower", "mm_projector")
    for part in parts:
        if published_name(name).startswith(f"model.{part}."):
            return part
    return "language_model"


def add_adapters(model: YiVLForCausalLM, arguments: ModelArguments, base: str) -> PeftModel:
    """Put fresh LoRA adapters on the linear layers of the decoder and, if asked, of the ViT.

    Args:
        model: Without adapters.
        arguments: Rank, scale, dropout, and whether the ViT gets adapters.
        base: What the adapter folder will name as its base model.
    """
    targets = _DECODER_LINEARS
    if arguments.lora_vision_tower:
        used = "|".join(str(index) for index in range(model.config.num_vision_layers))
        targets += rf"|model\.vision_tower\..*\.layers\.({used})\.({_VIT_LINEARS})"
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def select_trainable(model: nn.Module, arguments: ModelArguments, num_vision_layers: int) -> None:
    """Let those parameters require gradients that train, in place.

    ViT layers behind the one that feeds the projector never run, so they never train.

    Args:
        model: With adapters, if any.
        arguments: What trains.
        num_vision_layers: ViT layers that run.
    """
    trains = {
        "vision_tower": arguments.unfreeze_mm_vision_tower,
        "mm_projector": not arguments.freeze_mm_mlp_adapter,
        "language_model": arguments.trains_language_model,
    }
    for name, parameter in model.named_parameters():
        is_adapter = ADAPTER in name
        runs = not _is_behind(published_name(name), num_vision_layers)
        may_train = parameter.is_floating_point() and runs
        parameter.requires_grad = is_adapter or (may_train and trains[part_of(name)])


def _is_behind(name: str, num_vision_layers: int) -> bool:
    """Whether a ViT parameter lies behind the layer whose output is used."""
    if part_of(name) != "vision_tower":
        return False
    _, _, rest = name.partition(".encoder.layers.")
    return "post_layernorm" in name or (bool(rest) and int(rest.split(".")[0]) >= num_vision_layers)


def keep_masters(model: nn.Module) -> None:
    """Turn what trains into float32, in place: in 16 bits small updates would vanish.

    DeepSpeed keeps float32 copies of its own and needs no help.
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
    """Return the optimizer's groups: one for each learning rate, with and without weight decay.

    Args:
        model: With its trainable parameters selected.
        arguments: Learning rates and weight decay.
        decayed: Names of the parameters that decay (no biases, no norms).
    """
    decayed = set(decayed)
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
        # The rate of the first group is the one that is logged.
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0][0] != "language_model")
    ]


@dataclass(frozen=True)
class PartSize:
    """What one line of the table says."""

    name: str
    parameters: int
    trainable: int
    learning_rate: float


def part_sizes(model: nn.Module, arguments: YiVLTrainingArguments) -> list[PartSize]:
    """Count the parameters of each part, and those that train; adapters count apart."""
    counts: dict[tuple[Part, bool], list[int]] = {(part, False): [0, 0] for part in get_args(Part)}
    for name, parameter in model.named_parameters():
        count = counts.setdefault((part_of(name), ADAPTER in name), [0, 0])
        # ZeRO-3 leaves an empty tensor and the true size beside it; 4 bits pack two numbers into one byte.
        shape = getattr(parameter, "ds_shape", None) or getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = parameter.numel() if shape is None else torch.Size(shape).numel()
        count[0] += size
        count[1] += size * parameter.requires_grad
    return [
        PartSize(f"{part} adapters" if is_adapter else part, size, trainable, learning_rate_of(part, arguments))
        for (part, is_adapter), (size, trainable) in counts.items()
    ]


def parameter_table(sizes: Iterable[PartSize]) -> str:
    """Return the table that is printed before the first step."""
    lines = [f"{'part':<24}{'parameters':>16}{'trained':>16}  learning rate"]
    for size in sizes:
        rate = f"{size.learning_rate:g}" if size.trainable else "frozen"
        lines.append(f"{size.name:<24}{size.parameters:>16,}{size.trainable:>16,}  {rate}")
    return "\n".join(lines)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that have parameters of which none trains."""
    frozen: list[nn.Module] = []
    for child in model.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.append(child)
        else:
            frozen += frozen_modules(child)
    return frozen


def freeze_modes(frozen: Iterable[nn.Module]) -> None:
    """Put frozen modules into eval mode; to be called after ``model.train()``.

    The layers themselves stay in training mode, and only what is inside them changes: transformers recomputes a layer
    in the backward pass only in training mode, and the gradient of the projector passes through a frozen decoder.
    """
    for module in frozen:
        module.eval()
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


def recompute_layers(model: nn.Module, *, language_model: bool, vision_tower: bool) -> None:
    """Choose whose layers are computed again in the backward pass instead of being kept in memory."""
    chosen = {"vision_tower": vision_tower, "language_model": language_model}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = chosen["vision_tower" if ".vision_tower." in name else "language_model"]
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
