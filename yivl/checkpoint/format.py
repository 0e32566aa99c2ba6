"""The Yi-VL (LLaVA) checkpoint format: names of files and keys, reading them, and comparing keys and shapes.

Code in pickled files never runs.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from yivl.errors import CheckpointError
from yivl.files.json_files import read_json as read_json

StateDict = dict[str, torch.Tensor]

TOWER: Final = "model.vision_tower.vision_tower."
"""Prefix of the ViT keys in the main files."""
VIT: Final = f"{TOWER}vision_model."
"""The same with the prefix of ``CLIPVisionModel``, which transformers 5.6 dropped in memory but not on disk."""
PROJECTOR: Final = "model.mm_projector."

WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference of transformers."""
TOKENIZER_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""In addition to ``tokenizer.model``."""
UNUSED_FILES: Final = ("*/open_clip_*", "*.png", "*.jpg", "*.py", ".gitattributes")
"""Files no load reads. The ViT folder of the released checkpoints holds a second copy at 224 pixels of 3.9 GB; the
programs in that of InternVL-Chat are never run."""
METADATA: Final = {"format": "pt"}
"""Of every safetensors file: transformers refuses files without it."""

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_TRAINABLES: Final = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
"""Trained parameters of the base model. Source: haotian-liu/LLaVA, llava/train/train.py (the ``.bin``)."""
ADAPTER_SETTINGS: Final = "yivl_adapter_config.json"
"""``image_size`` and ``image_aspect_ratio`` an adapter was trained with. Source: ours; LLaVA adapters have none."""
NUM_TRAINED: Final = "num_non_lora_trainables"
"""Field of ``ADAPTER_SETTINGS``: tensors in ``NON_LORA_TRAINABLES``. Adapters of LLaVA and older ones lack it."""
ADAPTER: Final = ".lora_"
"""Part of the name of every LoRA parameter of peft."""

ARGUMENTS: Final = "training_arguments.json"
"""Resolved flags of a run, in its output folder and its checkpoints."""
RUN_CONFIG: Final = "training_config.yaml"
"""The flags of a run for ``--config``, beside ``ARGUMENTS``, which also holds what transformers derives from them."""
RECORD: Final = "training_run.json"
"""Origin of a run: ``base_model`` (a hub id, or null), ``sources`` of the data, ``versions`` of software."""
LOG: Final = "log.jsonl"
"""Log of a run, in its output folder."""

WEIGHT_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of weights that are not quantized."""
_SAFETENSORS_DTYPES: Final = dict(zip(("F64", "F32", "F16", "BF16"), WEIGHT_DTYPES, strict=True))

# Suffixes of computed buffers that old versions of transformers saved.
_BUFFERS: Final = (".rotary_emb.inv_freq", ".embeddings.position_ids")
_MAX_PROBLEMS: Final = 5  # named in a message


def published_name(name: str) -> str:
    """Return the checkpoint key of a parameter, also of one that peft has wrapped."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def check_keys(
    source: str | os.PathLike[str],
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    *,
    fit: str = "config.json",
    rename: Callable[[str], str] = str,
) -> None:
    """Compare keys and shapes of weights with those of a model.

    Args:
        source: File or folder of the weights.
        expected: Of the model; parameters that ZeRO-3 has partitioned count with their full shape.
        found: Of the weights.
        fit: What the weights have to fit.
        rename: Returns the name of a key in the files, for the error.

    Raises:
        CheckpointError: If they differ.
    """
    problems = [f"missing {rename(key)}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {rename(key)}" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(expected.keys() & found.keys()):
        shape = list(getattr(expected[key], "ds_shape", expected[key].shape))
        if shape != list(found[key].shape):
            problems.append(f"{rename(key)} is {list(found[key].shape)}, expected {shape}")
        elif found[key].dtype not in WEIGHT_DTYPES:
            dtype = str(found[key].dtype).removeprefix("torch.")
            problems.append(f"{rename(key)} is {dtype}, expected a floating-point dtype")
    if problems:
        more = f"; {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(f"{source}: the weights do not fit {fit}: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")


def read_image_settings(adapter: Path) -> dict[str, Any]:
    """Return ``image_size`` and ``image_aspect_ratio`` of an adapter; neither if its folder does not record them.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = adapter / ADAPTER_SETTINGS
    if not path.is_file():
        return {}
    fields = read_json(path)
    return {name: fields[name] for name in ("image_size", "image_aspect_ratio")}


def find_weights(folder: str | os.PathLike[str], names: tuple[str, ...] = WEIGHTS) -> Path:
    """Return the first weight file of a folder among ``names``.

    Raises:
        CheckpointError: If there is none.
    """
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise CheckpointError(f"{folder}: no {' or '.join(names)}; the weights are missing")


def read_weights(path: Path) -> StateDict:
    """Return the tensors of a safetensors or ``.bin`` file; a ``.bin`` file is memory-mapped.

    Of the checkpoint of a training run with a ``state_dict``, as open_clip writes it, these are its tensors.

    Raises:
        CheckpointError: If the file is missing, damaged, pickles more than tensors, or holds quantized weights.
    """
    check_weight_file(path)
    weights: Any
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors; use a file in safetensors format") from error
    except Exception as error:  # torch.load has no exception type of its own for damaged files
        raise CheckpointError(
            f"{path}: cannot be read as weights ({type(error).__name__}); download it again"
        ) from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: holds no tensors by name; download it again")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {key!r} is no tensor; download it again")
    return dict(weights)


def read_shapes(path: Path) -> StateDict:
    """Return the tensors of a weight file on the meta device, without reading their values.

    Raises:
        CheckpointError: As ``read_weights``.
    """
    if path.suffix != ".safetensors":
        return {key: value.to("meta") for key, value in read_weights(path).items()}
    check_weight_file(path)
    shapes: StateDict = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no dictionary)
            part = file.get_slice(key)
            # Of the other dtypes only that they are not of weights is asked.
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.int64)
            shapes[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return shapes


def find_trained(adapter: Path) -> Path | None:
    """Return the file of the parameters that were trained in addition to an adapter, or ``None`` if there were none.

    Raises:
        CheckpointError: If it is missing or damaged, or holds fewer than the folder records.
    """
    path = next((adapter / name for name in NON_LORA_TRAINABLES if (adapter / name).is_file()), None)
    settings = adapter / ADAPTER_SETTINGS
    expected = read_json(settings).get(NUM_TRAINED, 0) if settings.is_file() else 0
    if not isinstance(expected, int):
        raise CheckpointError(f"{settings}: {NUM_TRAINED} is {expected!r}; expected an integer")
    found = 0 if path is None else len(read_shapes(path))
    if found < expected:
        path = path or adapter / NON_LORA_TRAINABLES[0]
        raise CheckpointError(
            f"{path}: holds {found} of the {expected} tensors trained with the adapter; copy the whole folder"
        )
    return path


def check_utf8(path: Path) -> None:
    """Refuse a path that is not UTF-8: safetensors writes such files and cannot read them, nor sentencepiece.

    Raises:
        CheckpointError: If it is not.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        advice = "rename it, or set LC_ALL=C.UTF-8"
        raise CheckpointError(f"{path}: is not a UTF-8 path in this locale; {advice}") from error


def check_weight_file(path: Path) -> None:
    """Check the header of a weight file, which an incomplete download lacks or contradicts.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; download it")
    check_utf8(path)
    is_whole = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        with suppress(SafetensorError), safe_open(path, framework="pt"):
            is_whole = True
    if not is_whole:
        raise CheckpointError(f"{path}: damaged, truncated or a git-lfs pointer; download it again")


def read_index(path: Path) -> list[str]:
    """Return the names of the shards that the index of a sharded checkpoint lists.

    Raises:
        CheckpointError: If the file is damaged, or names a file outside of its folder.
    """
    return sorted(set(read_json(path)["weight_map"].values()))


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the main weight files that transformers would read from a checkpoint folder, each checked.

    Raises:
        CheckpointError: If there is none, or one is missing or damaged.
    """
    for name in WEIGHTS:
        whole, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if whole.is_file():
            paths = [whole]
        elif index.is_file():
            paths = [Path(folder) / shard for shard in read_index(index)]
        else:
            continue
        for path in paths:
            check_weight_file(path)
        return paths
    raise CheckpointError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)}, or shards with their index")


def read_main_shapes(folder: str | os.PathLike[str]) -> StateDict:
    """Return the tensors of the main weight files of a checkpoint on the meta device, without computed buffers.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    shapes: StateDict = {}
    for path in weight_files(folder):
        shapes |= read_shapes(path)
    return _without_buffers(shapes)


def read_main_weights(folder: str | os.PathLike[str]) -> StateDict:
    """Return the tensors of the main weight files of a checkpoint, without computed buffers.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    weights: StateDict = {}
    for path in weight_files(folder):
        weights |= read_weights(path)
    return _without_buffers(weights)


def without_tower(weights: Mapping[str, torch.Tensor]) -> StateDict:
    """Return the weights of the main files without their copy of the ViT."""
    return {key: value for key, value in weights.items() if not key.startswith(TOWER)}


def _without_buffers(weights: Mapping[str, torch.Tensor]) -> StateDict:
    return {key: value for key, value in weights.items() if not key.endswith(_BUFFERS)}
