"""Whether a checkpoint of a run is complete and undamaged, before a run is resumed from it."""

import logging
import math
import re
import shlex
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState

from yivl.checkpoint.format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ARGUMENTS,
    RECORD,
    check_weight_file,
    find_weights,
    read_json,
    weight_files,
)
from yivl.checkpoint.manifest import MANIFEST, check_size, read_manifest
from yivl.errors import CheckpointError
from yivl.train.hashing import hash_on_all_ranks
from yivl.train.ranks import on_rank_0
from yivl.train.resume import STATE, finished_checkpoints

logger = logging.getLogger(__name__)


def check_files(checkpoint: Path) -> None:
    """Check that the files of a checkpoint are those that were written; all ranks call it, and each reads a part.

    Sizes and hashes are compared with the manifest. Earlier versions wrote none: then the files that a resumed run
    needs have to be there, and not truncated.

    Raises:
        CheckpointError: If files are missing or damaged; names the checkpoint before.
    """
    expected = on_rank_0(lambda: _check_sizes(checkpoint))
    hashes = hash_on_all_ranks(checkpoint, {name: size for name, (size, _) in expected.items()})
    damage = [f"{name} is damaged" for name, (_, digest) in expected.items() if hashes[name] != digest]
    on_rank_0(lambda: _refuse(checkpoint, damage))


def _check_sizes(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Check what is read at once, and return the sizes and hashes to compare; none without a manifest."""
    if (checkpoint / MANIFEST).is_file():
        expected = read_manifest(checkpoint)
        found = {name: check_size(checkpoint / name, size) for name, (size, _) in expected.items()}
        damage = [f"{name} {reason}" for name, reason in found.items() if reason]
    else:
        logger.warning("%s: an earlier version wrote no %s; hashes are not checked", checkpoint, MANIFEST)
        expected, damage = {}, _find_damage_without_manifest(checkpoint)
    _refuse(checkpoint, damage)
    return expected


def _refuse(checkpoint: Path, damage: Sequence[str]) -> None:
    if damage:
        raise CheckpointError(f"{checkpoint} is damaged: {', '.join(sorted(damage)[:3])}; {_advise(checkpoint)}")


def _find_damage_without_manifest(checkpoint: Path) -> list[str]:
    if missing := [name for name in (STATE, ARGUMENTS, RECORD) if not (checkpoint / name).is_file()]:
        return [f"{name} is missing" for name in missing]
    arguments = read_json(checkpoint / ARGUMENTS)
    read_json(checkpoint / RECORD)
    read_json(checkpoint / STATE)
    ranks = range(arguments.get("world_size", 1))
    needed = ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    # DeepSpeed and FSDP have files of their own, beside the state of the schedule.
    needed += (
        ["scheduler.pt"] if arguments.get("deepspeed") or arguments.get("fsdp") else ["optimizer.pt", "scheduler.pt"]
    )
    damage = [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]
    try:
        TrainerState.load_from_json(str(checkpoint / STATE))
    except (ValueError, TypeError, RecursionError):
        damage.append(f"{STATE} is damaged")
    if (checkpoint / ADAPTER_CONFIG).is_file():
        find_weights(checkpoint, ADAPTER_WEIGHTS)
    elif not arguments.get("deepspeed"):
        weight_files(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        if not _is_readable(path):
            damage.append(f"{path.relative_to(checkpoint).as_posix()} is damaged or truncated")
    return damage


def _is_readable(path: Path) -> bool:
    """Return whether tensors can be read from a file: of those of PyTorch, the checksums have to fit, too."""
    try:
        if path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix in (".safetensors", ".bin"):
            check_weight_file(path)
    except (CheckpointError, zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, ValueError):
        return False  # a damaged header may ask for a password, or for another compression
    return True


def _advise(checkpoint: Path) -> str:
    """Return how to continue without a damaged checkpoint."""
    checkpoints = finished_checkpoints(checkpoint.parent)
    before = [path for path in checkpoints if path.name != checkpoint.name and _step(path) < _step(checkpoint)]
    moved = checkpoint.with_name(f"damaged-{checkpoint.name}")
    move = f"move it away (mv {shlex.quote(str(checkpoint))} {shlex.quote(str(moved))})"
    if not before:
        return f"there is no checkpoint before it: {move} and start again without --resume"
    return f"{move} and give --resume {shlex.quote(str(before[-1]))}"


def _step(checkpoint: Path) -> float:
    """Return the step in the name of a checkpoint, or infinity for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else math.inf
