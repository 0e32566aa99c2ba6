"""Weight files: which belong to a folder, whether they are whole, and what they hold. Pickled code never runs."""

import json
import os
import zipfile
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from yivl.errors import CheckpointError

StateDict = dict[str, torch.Tensor]

BUFFERS: Final = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Tensors that old versions of transformers wrote and that are computed, not learned."""

# In the order of preference of transformers.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_weights(folder: str | os.PathLike[str], names: tuple[str, ...] = _WHOLE) -> Path:
    """Return the first weight file of a folder among ``names``.

    Raises:
        CheckpointError: If there is none.
    """
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise CheckpointError(f"{folder}: no {' or '.join(names)}; the weights are missing")


def read_weights(path: Path) -> StateDict:
    """Return the tensors of a safetensors or ``.bin`` file, the latter mapped into memory and without its code.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    check_weight_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights: StateDict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no exception type of its own for damaged files
        raise CheckpointError(f"{path}: cannot be read as weights ({type(error).__name__}); get it anew") from error
    return weights


def check_weight_file(path: Path) -> None:
    """Look at the frame of a file, not at its tensors: a cut-off download is found at once.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; download it")
    is_whole = True
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            is_whole = False
    else:
        is_whole = zipfile.is_zipfile(path)
    if not is_whole:
        raise CheckpointError(f"{path}: damaged, cut off or a git-lfs pointer; download it again")


def check_checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Check every main weight file that transformers would read from a checkpoint folder, and return them.

    Raises:
        CheckpointError: If there is none, or one is missing or damaged.
    """
    for name, index_name in zip(_WHOLE, _INDEXES, strict=True):
        index = Path(folder) / index_name
        if (Path(folder) / name).is_file():
            check_weight_file(Path(folder) / name)
            return [Path(folder) / name]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index}: not the index of a sharded checkpoint; download it again") from error
            paths = [Path(folder) / shard for shard in sorted(shards)]
            for path in paths:
                check_weight_file(path)
            return paths
    raise CheckpointError(f"{folder}: no weights; expected {' or '.join(_WHOLE)}, or shards with their index")
