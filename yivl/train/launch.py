"""Start one process per GPU as torchrun does, and exit with the code of the rank that failed.

python -m yivl.train.launch --nproc-per-node 8 -m yivl.train FLAGS
"""

import argparse
import logging
import os
import signal
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from yivl import command_line
from yivl.errors import YiVLError
from yivl.train.arguments import parse_arguments
from yivl.train.cpu_threads import share_cores
from yivl.train.flags import torchrun_parser
from yivl.train.plan import RunPlan

if TYPE_CHECKING:
    from yivl.train.heartbeat import Heartbeat

_SIGNALS: Final = "SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun forwards to the ranks: its default with SIGUSR1 in the place of SIGTERM."""
_SAVE_SECONDS: Final = "600"
"""Time for the ranks to save a checkpoint after a signal: 600 GB at 1 GB/s. Source: ours."""


def main() -> None:
    """Run torchrun with the flags of this process."""
    flags = torchrun_parser("python -m yivl.train.launch").parse_args(sys.argv[1:])
    _check_flags(flags)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of lost connections hold stack traces
    # A store that lives through restarts keeps the addresses of ended ranks, which restarted ones try to reach.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    if (flags.nproc_per_node or "").isdigit():  # else torchrun counts GPUs or cores
        share_cores(int(flags.nproc_per_node))
    # The rank that failed has logged its error in one line; torchrun would add lines of its own.
    logging.disable(logging.ERROR)
    received = _forward_sigterm()
    heartbeat = _heartbeat(flags)
    try:
        with heartbeat or nullcontext():
            torchrun(sys.argv[1:])
    except ChildFailedError as error:
        if heartbeat is not None and heartbeat.lost:
            sys.exit(1)  # the line about the node is written
        rank, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else f"error: rank {rank} was ended by signal {-first.exitcode}")
    except SignalException as error:
        sys.exit(128 + (received[0] if received else error.sigval))
    except (RendezvousError, DistError) as error:
        from yivl.train.nodes import check_port

        cause = error.__cause__ or error
        check_port(cause)
        reason = " ".join(str(cause).split())
        sys.exit(f"error: the nodes did not find each other, or one was lost; resume with --resume auto ({reason})")


def _forward_sigterm() -> list[int]:
    """Let SIGTERM reach the ranks as SIGUSR1, at which they save a checkpoint; return the list that will hold it.

    torchrun itself sends SIGTERM to the ranks when one of them failed, and the others cannot finish their step.
    """
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # torchrun has not started ranks yet
            sys.exit(128 + number)
        os.kill(os.getpid(), signal.SIGUSR1)

    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", _SIGNALS)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SAVE_SECONDS)
    signal.signal(signal.SIGTERM, forward)
    return received


def _heartbeat(flags: argparse.Namespace) -> "Heartbeat | None":
    """Return the heartbeat of a run on several nodes.

    Raises:
        YiVLError: If ``NODE_TIMEOUT`` is no positive number of seconds.
    """
    if flags.standalone or flags.nnodes in (None, "1", "1:1"):
        return None

    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    from yivl.train.heartbeat import NODE_TIMEOUT, Heartbeat

    text = os.environ.get("NODE_TIMEOUT", str(NODE_TIMEOUT))
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0
    if timeout <= 0:
        raise YiVLError(f"NODE_TIMEOUT={text}: expected a positive number of seconds")
    address = flags.rdzv_endpoint or f"{flags.master_addr or '127.0.0.1'}:{flags.master_port or 29500}"
    return Heartbeat(*parse_rendezvous_endpoint(address, default_port=29400), timeout)


def _check_flags(flags: argparse.Namespace) -> None:
    """Check the flags of training before every rank reports the same error.

    Raises:
        YiVLError: If they are wrong, for some number of nodes if it may change.
    """
    processes, nodes = flags.nproc_per_node or "1", [part for part in (flags.nnodes or "1").split(":") if part]
    if not (flags.module and flags.training_script == "yivl.train"):
        return
    arguments = parse_arguments(flags.training_script_args)
    training = arguments.training
    is_elastic = len(set(nodes)) > 1
    if (is_elastic or flags.max_restarts) and training.resume != "auto":
        raise YiVLError("--max-restarts, or a range of --nnodes: add --resume auto, so that a restarted run continues")
    if is_elastic and training.global_batch_size is None:
        raise YiVLError(f"--nnodes {flags.nnodes}: add --global_batch_size, which must not change with the nodes")
    if is_elastic and training.deepspeed:
        raise YiVLError(
            f"--nnodes {flags.nnodes}: DeepSpeed cannot load the optimizer states of another number of ranks; give a "
            'fixed --nnodes, or DEEPSPEED=""'
        )
    if processes.isdigit() and all(part.isdigit() for part in nodes):
        for number in range(int(nodes[0]), int(nodes[-1]) + 1):
            RunPlan.of(arguments, world_size=number * int(processes))


if __name__ == "__main__":
    command_line.run(main)
