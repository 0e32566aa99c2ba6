"""Local folders of models named by a folder, a hub id or a ModelScope id; of a repository only what a load reads."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2

from yivl.checkpoint.format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    NON_LORA_TRAINABLES,
    UNUSED_FILES,
    WEIGHTS,
    check_utf8,
    read_index,
    read_json,
)
from yivl.checkpoint.hf_format import is_hf
from yivl.errors import CheckpointError, YiVLError

MODELSCOPE: Final = "modelscope:"
"""Prefix of the id of a model on ModelScope."""

# Configurations, tokenizers, templates, licenses. They tell which weight files there are.
_SMALL_FILES: Final = ("*.json", "*.model", "*.jinja", "LICENSE*", "NOTICE*")

_EXPECTED: Final = "a checkpoint folder or a hub id such as 01-ai/Yi-VL-6B"

Fetch = Callable[[list[str]], Any]
"""Downloads the files of a repository that match the patterns."""


def resolve_checkpoint(model_path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """Return the local folder of a checkpoint, a language model or an adapter, after downloading an id.

    Of weights in several formats, only the preferred one is downloaded.

    Args:
        model_path: Folder, id on the Hugging Face hub, or ``modelscope:`` and an id there.
        weights: Whether to download weights, too; without them the folder has what ``read_small_files`` reads.

    Raises:
        CheckpointError: If there is no such folder and no such repository can be reached, or its path is not UTF-8.
        YiVLError: If the ``modelscope`` package is needed and not installed.
    """
    name = os.fspath(model_path)
    if not name:
        raise CheckpointError("the model path is empty; give a checkpoint folder or a hub id")
    fetch_rest = _fetch_weights if weights else _fetch_weights_of_another_llava
    folder = Path(name) if Path(name).is_dir() else download_model(name, [*_SMALL_FILES], fetch_rest)
    check_utf8(folder)
    return folder


def download_model(
    name: str, small_files: list[str], fetch_rest: Callable[[Path, Fetch], None], expected: str = _EXPECTED
) -> Path:
    """Download parts of the model of an id and return its folder; what is there already is not downloaded again.

    Args:
        name: As ``resolve_checkpoint``, without folders.
        small_files: Patterns of the files to download first.
        fetch_rest: Given the folder, downloads what the first files ask for.
        expected: What the error of a wrong name asks for.

    Raises:
        CheckpointError: If the repository cannot be reached.
        YiVLError: If the ``modelscope`` package is needed and not installed.
    """
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE), small_files, fetch_rest)
    try:
        folder = Path(snapshot_download(name, allow_patterns=small_files, ignore_patterns=[*UNUSED_FILES]))

        def fetch(files: list[str]) -> Any:
            # Of the commit that the folder is named after. The library warns if no pattern matches a file.
            patterns = [*small_files, *files]
            return snapshot_download(
                name, revision=folder.name, allow_patterns=patterns, ignore_patterns=[*UNUSED_FILES]
            )

        fetch_rest(folder, fetch)
    except (HFValidationError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such folder, and no model of that name could be downloaded; give {expected} "
            f"({reason_of(error)})"
        ) from error
    return folder


def fetch_first(folder: Path, fetch: Fetch, names: tuple[str, ...]) -> None:
    """Download the first of the files that the repository has."""
    for name in names:
        fetch([name])
        if (folder / name).is_file():
            return


def reason_of(error: BaseException) -> str:
    """Return the root cause of a failed download in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"


def _from_modelscope(model_id: str, small_files: list[str], fetch_rest: Callable[[Path, Fetch], None]) -> Path:
    """Download from ModelScope with its own package; the errors of its versions have no common type.

    Each part is of the default revision at its time: the package does not report which commit it downloaded.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise YiVLError(f"{MODELSCOPE}{model_id}: the modelscope package is not installed; pip install modelscope")
    download = importlib.import_module("modelscope").snapshot_download
    try:
        folder = Path(download(model_id, allow_patterns=small_files, ignore_patterns=[*UNUSED_FILES]))
        fetch_rest(folder, lambda files: download(model_id, allow_patterns=files))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{MODELSCOPE}{model_id}: could not be downloaded; give an id such as {MODELSCOPE}01ai/Yi-VL-6B "
            f"({reason_of(error)})"
        ) from error
    return folder


def _fetch_weights(folder: Path, fetch: Fetch) -> None:
    """Download the weights of a checkpoint, a language model or an adapter, and those of the ViT it names."""
    if (folder / ADAPTER_CONFIG).is_file():
        fetch_first(folder, fetch, ADAPTER_WEIGHTS)
        fetch_first(folder, fetch, NON_LORA_TRAINABLES)
        return
    fetch_main_weights(folder, fetch)
    if (folder / "config.json").is_file():
        tower = read_json(folder / "config.json").get("mm_vision_tower")
        if isinstance(tower, str) and not os.path.isabs(tower):
            place = os.path.normpath(tower).replace(os.sep, "/")
            fetch_first(folder, fetch, (f"{place}/{WEIGHTS[0]}", f"{place}/{WEIGHTS[1]}"))


def _fetch_weights_of_another_llava(folder: Path, fetch: Fetch) -> None:
    """Download the weights of a LLaVA without the mark of Yi-VL: their keys tell whether it is one."""
    path = folder / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if is_hf(fields) and not fields.get("is_yi_vl_derived_model"):
        fetch_main_weights(folder, fetch)


def fetch_main_weights(folder: Path, fetch: Fetch) -> None:
    """Download what ``weight_files`` takes: in the order of ``WEIGHTS`` the whole file, or the shards of its index."""
    for name in WEIGHTS:
        fetch([name])
        if (folder / name).is_file():
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            fetch(read_index(index))
            return
