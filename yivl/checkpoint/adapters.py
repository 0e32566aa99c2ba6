"""LoRA adapter folders: the files of peft, other trained parameters, and the image settings."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    METADATA,
    NON_LORA_TRAINABLES,
    NUM_TRAINED,
    StateDict,
    check_keys,
    find_trained,
    find_weights,
    published_name,
    read_json,
    read_weights,
)
from yivl.command_line import is_out_of_memory
from yivl.errors import CheckpointError
from yivl.image_processing import ImageProcessor
from yivl.model.modeling import YiVLForCausalLM


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    image_processor: ImageProcessor,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter folder.

    Args:
        model: A ``YiVLForCausalLM`` wrapped by peft.
        folder: Empty or new.
        image_processor: The image settings of training, which an answer needs too.
        state_dict: Weights gathered by the caller (ZeRO-3); those of ``model`` by default.
    """
    model.save_pretrained(os.fspath(folder), state_dict=state_dict, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template of peft
    settings = {
        "model_type": model.config.model_type,  # for the model card
        "image_size": image_processor.image_size,
        "image_aspect_ratio": image_processor.aspect_ratio,
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ADAPTER not in name]
    write_json(folder / ADAPTER_SETTINGS, settings | ({NUM_TRAINED: len(trained)} if trained else {}))
    if trained:
        weights = model.state_dict() if state_dict is None else state_dict
        tensors = {published_name(name): weights[name].detach().cpu().contiguous() for name in trained}
        save_file(tensors, folder / NON_LORA_TRAINABLES[0], metadata=METADATA)


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Load the weights of an adapter folder into the model that saved them, in place.

    Raises:
        CheckpointError: If the folder holds no adapter, or the adapter of another model.
    """
    weights = read_weights(find_weights(folder, ADAPTER_WEIGHTS))
    _check_adapter(folder, model, weights)
    set_peft_model_state_dict(model, weights)
    _copy_trained(model, folder)


def load_adapter(model: YiVLForCausalLM, folder: Path, *, merge: bool = False) -> YiVLForCausalLM:
    """Return the base model with a LoRA adapter and the other parameters of its folder, in place.

    Args:
        model: The base, with the image size of the adapter, and unquantized if the adapter is to be merged.
        folder: With ``non_lora_trainables.safetensors`` (LLaVA: ``.bin``) if more than the adapter was trained.
        merge: Add the adapter to the weights of the base.

    Raises:
        CheckpointError: If the folder holds no adapter, or the adapter of another model.
    """
    weights = read_weights(find_weights(folder, ADAPTER_WEIGHTS))
    if any("language_model." in key for key in weights):
        raise CheckpointError(
            f"{folder}: an adapter of transformers' LLaVA; merge it into its -hf model with the program that trained "
            "it (llamafactory-cli export) and give the merged folder"
        )
    _check_config(folder, weights)
    try:
        config = PeftConfig.from_pretrained(os.fspath(folder))
        for name in ("rank_pattern", "alpha_pattern"):  # null is none of them
            setattr(config, name, getattr(config, name) or {})
        if not any("vision_tower" in key for key in weights):
            # LLaVA names targets by their last part, which the ViT shares; its adapters never include the ViT.
            config.exclude_modules = r".*vision_tower.*"
        adapted = PeftModel.from_pretrained(model, os.fspath(folder), config=config)
    except Exception as error:  # peft checks few of the fields, and a wrong one can raise any exception
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{folder}: not an adapter of this base model ({error})") from error
    _check_adapter(folder, adapted, weights)
    model = adapted.merge_and_unload() if merge else adapted.get_base_model()
    _copy_trained(model, folder)
    return model


def _check_config(folder: Path, weights: StateDict) -> None:
    """Check the fields of ``adapter_config.json`` that decide what peft builds and how large.

    Raises:
        CheckpointError: If the adapter is not LoRA, or its rank exceeds every dimension of its weights.
    """
    path = folder / ADAPTER_CONFIG
    fields = read_json(path)
    kind, rank = fields.get("peft_type"), fields.get("r", 8)  # 8 is the default of peft
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; expected 'LORA'")
    largest = max((size for value in weights.values() for size in value.shape), default=0)
    if rank > largest:
        raise CheckpointError(f"{path}: r is {rank}; the weights have at most {largest}")


def _check_adapter(folder: Path, model: PeftModel, weights: StateDict) -> None:
    # The files of peft leave out the name of the adapter, and the end of the name of DoRA's magnitudes.
    expected = {
        name.replace("_magnitude_vector.default.weight", "_magnitude_vector").replace(".default.", "."): value
        for name, value in model.named_parameters()
        if ADAPTER in name
    }
    check_keys(folder, expected, weights, fit="this base model")


def _copy_trained(model: nn.Module, folder: Path) -> None:
    """Copy the parameters that were trained in addition to the adapter into the model."""
    path = find_trained(folder)
    if path is None:
        return
    trained = {published_name(key): value for key, value in read_weights(path).items()}
    own = {published_name(name): parameter for name, parameter in model.named_parameters()}
    check_keys(path, {key: own[key] for key in trained.keys() & own.keys()}, trained, fit="this base model")
    with torch.no_grad():
        for key, value in trained.items():
            own[key].copy_(value)
