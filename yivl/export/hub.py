"""Checkpoints and adapters to the hub and from it: what a reader needs and nothing else, and never half of it."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its HTTP library
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from yivl.checkpoint.atomic import replace_dir, write_text
from yivl.checkpoint.format import check_checkpoint_files, check_weight_file, find_weights
from yivl.checkpoint.loading import NON_LORA_TRAINABLES, UNUSED_FILES, read_small_files, reason_of
from yivl.errors import CheckpointError
from yivl.export.model_card import CARD, is_generated, known_base, make_card
from yivl.model.configuration import read_json, vit_folder
from yivl.train.run_log import LOG

logger = logging.getLogger(__name__)

_ADAPTER: Final = "adapter_config.json"
_CONFIGS: Final = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json"),  # in a folder for SGLang
)
# What is published beside the weights and ``vit/``; not optimizers, arguments, bad rows and events, which name paths.
_PUBLISHED: Final = (
    *(*_CONFIGS, _ADAPTER, "added_tokens.json", "tokenizer.json", "tokenizer.model", "*.index.json"),
    *("chat_template.jinja", CARD, "LICENSE*", "NOTICE*", "loss.png", LOG, "train_results.json"),
)
_VIT_CONFIGS: Final = ("config.json", "preprocessor_config.json")
_MACHINE_PATH: Final = re.compile(r"/[^/\s]+/|\.\.[/\\]|~[/\\]|[A-Za-z]:[/\\]|file:")


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    base_model: str | None = None,
    licence: str | None = None,
    scores: Sequence[Path] = (),
    message: str = "Upload a Yi-VL model",
) -> str:
    """Publish a checkpoint or an adapter with its model card, and return the address of the commit.

    It is one commit: a reader sees the old model or the whole new one, and weights of the old one that have no
    successor go with it. After a stop the same call begins anew, without sending again what the hub has.

    Args:
        folder: A checkpoint in the published layout or an adapter; ``README.md`` is written into it, unless one
            written by hand is there.
        repo_id: Created if it is not there.
        private: Whether others shall not see it.
        base_model: Hub id of what the model was trained from; it takes the place of a path in ``adapter_config.json``.
        licence: For the card, where no ``LICENSE`` file lies in the folder.
        scores: For the card, ``scores.json`` files of ``python -m yivl.eval``.
        message: Of the commit.

    Raises:
        CheckpointError: If the folder is not whole or names a path of this machine; if a card written by hand would
            leave out ``licence`` or ``scores``; if the repository holds something else, or is public against
            ``private``; if the hub refuses or cannot be reached.
    """
    check_whole(folder)
    base = known_base(folder, base_model)
    contents = _without_paths(folder, base)
    card = None
    if not _is_by_hand(folder / CARD):
        card = make_card(folder, repo_id=repo_id, base_model=base, licence=licence, scores=scores)
    elif licence or scores:
        raise CheckpointError(f"{folder / CARD}: is written by hand and kept, so licence and scores go into it by hand")
    if get_token() is None:
        raise CheckpointError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _clear_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        there = {file.rfilename for file in info.siblings or ()}
        _check_target(api, repo_id, there, is_adapter=(folder / _ADAPTER).is_file())
        keeps_card = card is not None and CARD in there and not is_generated(_remote_text(api, repo_id, CARD))
    if private and not info.private:
        raise CheckpointError(f"{repo_id}: exists and is public; make it private on the hub, or upload it for all")
    if card is not None:
        write_text(folder / CARD, card)
    names = _names_to_publish(folder)
    left_out = {path.name for path in folder.iterdir()} - {name.split("/")[0] for name in names}
    if left_out:
        logger.info("not uploaded: %s", ", ".join(sorted(left_out)))
    if keeps_card:
        logger.info("%s: its %s is written by hand and kept", repo_id, CARD)
        names.remove(CARD)
    operations: list[Any] = [CommitOperationAdd(name, contents.get(name, os.fspath(folder / name))) for name in names]
    replaced = [name for name in sorted(there.difference(names)) if _is_weights(name)]
    if replaced:
        logger.info("deleted there, weights of another upload: %s", ", ".join(replaced))
    operations += [CommitOperationDelete(name) for name in replaced]
    with _clear_errors(repo_id):
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)


def download(repo_id: str, folder: Path, *, revision: str | None = None) -> None:
    """Fetch a checkpoint or an adapter into a plain folder, which appears when all of it is there and checked.

    Until then the files lie beside it in ``.NAME.partial``; after a stop the same call goes on with those that are
    missing. All files are of one commit.

    Args:
        repo_id: On the hub.
        folder: Empty or new.
        revision: A branch, tag or commit; by default the newest.

    Raises:
        CheckpointError: If ``folder`` holds something, the hub refuses or cannot be reached, or the repository holds
            no whole checkpoint or adapter.
    """
    target = folder.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{folder}: holds something already; give an empty or new folder")
    partial = target.with_name(f".{target.name}.partial")
    api = HfApi()
    with _clear_errors(repo_id):
        info = api.model_info(repo_id, revision=revision)
        logger.info("%s at %s: after a stop, the same command goes on", repo_id, info.sha)
        api.snapshot_download(repo_id, revision=info.sha, local_dir=partial, ignore_patterns=list(UNUSED_FILES))
    there = {file.rfilename for file in info.siblings or ()}
    for path in partial.rglob("*"):
        # The library's notes, and what a stopped download of another commit left.
        if path.is_file() and path.relative_to(partial).as_posix() not in there:
            path.unlink()
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    try:
        check_whole(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id}: no whole model in the published layout ({error})") from error
    replace_dir(partial, target)


def check_whole(folder: Path) -> None:
    """Check that a folder holds all files of a checkpoint in the published layout, or of an adapter.

    Raises:
        CheckpointError: If one is missing, damaged, or lies outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a checkpoint or an adapter")
    if (folder / _ADAPTER).is_file():
        read_json(folder / _ADAPTER)
        for path in [find_weights(folder, ("adapter_model.safetensors", "adapter_model.bin")), *_beside(folder)]:
            check_weight_file(path)
        return
    config, _, _ = read_small_files(folder)
    vit = vit_folder(folder, config.mm_vision_tower)
    if not vit.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}/config.json: mm_vision_tower={config.mm_vision_tower!r} is not in the folder")
    check_weight_file(find_weights(vit))
    check_checkpoint_files(folder)


def _beside(adapter: Path) -> list[Path]:
    """Return what was trained beside an adapter, in the forms that a load reads."""
    paths = (adapter / NON_LORA_TRAINABLES, (adapter / NON_LORA_TRAINABLES).with_suffix(".bin"))
    return [path for path in paths if path.is_file()]


def _names_to_publish(folder: Path) -> list[str]:
    """Return the files to upload, relative to the folder."""
    if (folder / _ADAPTER).is_file():
        weights = [*folder.glob("adapter_model.*"), *_beside(folder)]
    else:
        vit = vit_folder(folder, read_json(folder / "config.json")["mm_vision_tower"])
        weights = [vit / name for name in _VIT_CONFIGS if (vit / name).is_file()] + [find_weights(vit)]
        weights += check_checkpoint_files(folder)
    others = [
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _PUBLISHED)
    ]
    return sorted(Path(os.path.relpath(path, folder)).as_posix() for path in [*weights, *others])


def _without_paths(folder: Path, base: str | None) -> dict[str, bytes]:
    """Return the configurations that are uploaded in another form: that of an adapter names its base by hub id.

    Raises:
        CheckpointError: If one names a path of this machine.
    """
    contents: dict[str, bytes] = {}
    configs = [folder / name for name in (*_CONFIGS, _ADAPTER)]
    if (folder / "config.json").is_file() and not (folder / _ADAPTER).is_file():
        vit = vit_folder(folder, read_json(folder / "config.json")["mm_vision_tower"])
        configs += [vit / name for name in _VIT_CONFIGS]
    for path in (path for path in configs if path.is_file()):
        fields = read_json(path)
        if path.name == _ADAPTER:
            if base is None:
                named = fields.get("base_model_name_or_path")
                raise CheckpointError(f"{path}: names {named!r} as its base; give the base model's hub id")
            if fields.get("base_model_name_or_path") != base:
                fields["base_model_name_or_path"] = base
                contents[_ADAPTER] = (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
        for name, value in fields.items():
            if any(_MACHINE_PATH.match(text) for text in _texts(value)):
                raise CheckpointError(f"{path}: {name} is a path of this machine, of no use to others; mend it")
    return contents


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _check_target(api: HfApi, repo_id: str, there: set[str], *, is_adapter: bool) -> None:
    """Refuse a repository that holds another kind of model.

    Raises:
        CheckpointError: If it does.
    """
    if _ADAPTER in there:
        held = None if is_adapter else "an adapter"
    elif "config.json" not in there:
        held = None
    elif "mm_vision_tower" not in json.loads(_remote_text(api, repo_id, "config.json")):
        held = "another kind of model"
    else:
        held = "a whole model" if is_adapter else None
    if held:
        raise CheckpointError(f"{repo_id}: exists and holds {held}; give another name")


def _remote_text(api: HfApi, repo_id: str, name: str) -> str:
    return Path(api.hf_hub_download(repo_id, name)).read_text(encoding="utf-8")


def _is_by_hand(card: Path) -> bool:
    return card.is_file() and not is_generated(card.read_text(encoding="utf-8"))


def _is_weights(name: str) -> bool:
    """Whether a file of the repository is one that a load would take for the model's weights."""
    in_place = "/" not in name or re.fullmatch(r"vit/[^/]+/[^/]+", name)
    return bool(in_place) and name.endswith((".safetensors", ".bin", ".index.json"))


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one line.

    Raises:
        CheckpointError: In place of the errors of the hub's libraries.
    """
    try:
        yield
    except CheckpointError:
        raise
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: no such revision on the hub") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        meanings = {
            401: "not there, or not for this token; check the name, and log in with `hf auth login` or set HF_TOKEN",
            403: "the token may not do this; give one that may, or another name",
            404: "no such repository on the hub, or none that this token may see",
        }
        meaning = meanings.get(status, f"the hub refused, {reason_of(error)}")
        raise CheckpointError(f"{repo_id}: {meaning} ({status})") from error
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{repo_id}: the hub cannot be reached ({reason_of(error)})") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{repo_id}: {reason_of(error)}") from error
