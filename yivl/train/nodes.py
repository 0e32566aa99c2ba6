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
from yivl.train.ranks import end_all_ranks, of_all_ranks, on_rank_0, rank, world_size

PROBE: Final = ".probe-"
"""Prefix of a file that is in the output folder only while ``check_output_dir`` runs."""
_VISIBLE_SECONDS: Final = 10.0
"""Time for a new file to become visible on other nodes. Source: ours; NFS caches the absence of a file only after a
process looked for its name (nfs(5)), and this name is new."""


def check_output_dir(output_dir: str) -> None:
    """Check that all ranks see what rank 0 writes to the output folder, which must exist.

    Raises:
        YiVLError: If some do not.
        OSError: On rank 0, if it cannot write.
        SystemExit: On ranks that do not report the error, as ``on_rank_0`` raises it.
    """
    if world_size() == 1:
        return
    probe = Path(output_dir, on_rank_0(lambda: _write_probe(output_dir)))
    seen = of_all_ranks((socket.gethostname(), _becomes_visible(probe)))
    if rank() == 0:
        probe.unlink(missing_ok=True)
    blind = list(dict.fromkeys(host for host, visible in seen if not visible))
    if blind:
        error = (
            f"--output_dir {output_dir}: not shared: {', '.join(blind)} cannot see what rank 0 writes on {seen[0][0]}; "
            "give a folder on a shared file system, or --save_strategy no, with which rank 0 alone writes"
        )
        end_all_ranks(YiVLError(error))


def check_data(data_path: str, sources: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks read the same data, wherever it is; ``sources`` are those of ``Batches``.

    Raises:
        YiVLError: If some do not.
        SystemExit: On ranks that do not report the error.
    """
    ranks = of_all_ranks((socket.gethostname(), [dict(source) for source in sources]))
    if difference := _find_difference(ranks):
        end_all_ranks(YiVLError(f"--data_path {data_path}: {difference}; give all nodes the same data"))


def _find_difference(ranks: Sequence[tuple[str, list[dict[str, Any]]]]) -> str | None:
    """Return the first difference between the sources of rank 0 and those of another rank, given with their hosts."""
    host, expected = ranks[0]
    for number, (other, found) in enumerate(ranks):
        if len(found) != len(expected):
            return f"{len(expected)} sources on {host} and {len(found)} on {other} (rank {number})"
        for ours, theirs in zip(expected, found, strict=True):
            for name in ours | theirs:
                if name != "source" and ours.get(name) != theirs.get(name):
                    return (
                        f"{name} of {ours['source']} is {ours.get(name)} on {host} (rank 0) and {theirs.get(name)} on "
                        f"{other} (rank {number})"
                    )
    return None


@contextmanager
def reporting_lost_connections() -> Iterator[None]:
    """End this process with one line and exit code 1 if the connection to another rank is lost.

    Raises:
        YiVLError: If the port of rank 0 is in use.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_connection(error):
            raise
        check_port(error)
        # gloo begins with its source file and ends with advice.
        reason = " ".join(re.sub(r"^\[\S+/gloo/\S+\] ", "", str(error)).split("This is typically")[0].split())
        sys.stderr.write(
            f"error: rank {os.environ.get('RANK', 0)} on {socket.gethostname()} lost its connection to another rank; "
            f"resume with --resume auto ({reason})\n"
        )
        sys.stderr.flush()
        os._exit(1)  # at exit, libraries would wait for the other ranks again


def check_port(error: BaseException) -> None:
    """Raise a clearer error if PyTorch's one says that another program listens on the port of rank 0.

    Raises:
        YiVLError: If it says so.
    """
    if found := re.search(r"port: (\d+).*EADDRINUSE", str(error)):
        raise YiVLError(
            f"port {found[1]} is in use on {socket.gethostname()}; set MASTER_PORT to another one on all nodes"
        )


def _is_lost_connection(error: Exception) -> bool:
    """Return whether a collective failed; gloo raises a plain ``RuntimeError`` that names its source file."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _write_probe(output_dir: str) -> str:
    """Write an empty file and return its name, which is new: a node may remember that an old one was absent."""
    name = f"{PROBE}{uuid.uuid4().hex}"
    Path(output_dir, name).touch()
    return name


def _becomes_visible(path: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
