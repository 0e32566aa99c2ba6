"""What all ranks of a run must have in common before the first step, and what a lost connection looks like.

The launchers of the nodes watch each other in ``heartbeat``.
"""

import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from yivl.errors import YiVLError

_VISIBLE_SECONDS: Final = 10.0
"""Time for a new file to become visible on other nodes. Source: ours; NFS caches the absence of a file only after a
process looked for its name (nfs(5)), and this name is new."""


def check_output_dir(output_dir: str) -> None:
    """Check that all ranks see what rank 0 writes to the output folder.

    Raises:
        YiVLError: If some do not.
        OSError: If rank 0 cannot write.
    """
    if not _has_other_ranks():
        return
    name = f".probe-{uuid.uuid4().hex}"
    written: list[str | OSError] = [name]
    if dist.get_rank() == 0:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            Path(output_dir, name).touch()
        except OSError as error:
            written = [error]
    dist.broadcast_object_list(written)
    if isinstance(written[0], OSError):
        raise written[0]
    seen = _all_ranks((socket.gethostname(), _becomes_visible(Path(output_dir, written[0]))))
    if dist.get_rank() == 0:
        Path(output_dir, name).unlink(missing_ok=True)
    blind = list(dict.fromkeys(host for host, visible in seen if not visible))
    if blind:
        raise YiVLError(
            f"--output_dir {output_dir}: not shared: {', '.join(blind)} cannot see what rank 0 writes on {seen[0][0]}; "
            "give a folder on a shared file system, or --save_strategy no, with which rank 0 alone writes"
        )


def check_data(data_path: str, sources: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks read the same data, wherever it is; ``sources`` are those of ``Batches``.

    Raises:
        YiVLError: If some do not.
    """
    if not _has_other_ranks():
        return
    ranks = _all_ranks((socket.gethostname(), [dict(source) for source in sources]))
    host, expected = ranks[0]
    for rank, (other, found) in enumerate(ranks):
        if len(found) != len(expected):
            difference = f"{len(expected)} sources on {host} and {len(found)} on {other}"
            raise YiVLError(f"--data_path {data_path}: {difference} (rank {rank}); give all nodes the same data")
        for ours, theirs in zip(expected, found, strict=True):
            for name in ours | theirs:
                if name != "source" and ours.get(name) != theirs.get(name):
                    raise YiVLError(
                        f"--data_path {data_path}: {name} of {ours['source']} is {ours.get(name)} on {host} (rank 0) "
                        f"and {theirs.get(name)} on {other} (rank {rank}); give all nodes the same data"
                    )


@contextmanager
def reporting_lost_connections() -> Iterator[None]:
    """End this process with one line and exit code 1 if the connection to another rank is lost."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_connection(error):
            raise
        # gloo begins with its source file and ends with advice.
        reason = " ".join(re.sub(r"^\[\S+/gloo/\S+\] ", "", str(error)).split("This is typically")[0].split())
        sys.stderr.write(
            f"error: rank {os.environ.get('RANK', 0)} on {socket.gethostname()} lost its connection to another rank; "
            f"resume with --resume auto ({reason})\n"
        )
        sys.stderr.flush()
        os._exit(1)  # at exit, libraries would wait for the other ranks again


def _is_lost_connection(error: Exception) -> bool:
    """Return whether a collective failed; gloo raises a plain ``RuntimeError`` that names its source file."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _has_other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _becomes_visible(path: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
