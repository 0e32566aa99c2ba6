"""Start one process per GPU as torchrun does, and exit with the code of the rank that failed.

python -m yivl.train.launch --nproc-per-node 8 -m yivl.train FLAGS
"""

import argparse
import logging
import sys

from yivl import command_line
from yivl.train.arguments import parse_arguments
from yivl.train.cpu_threads import share_cores
from yivl.train.flags import torchrun_parser
from yivl.train.plan import RunPlan


def main() -> None:
    """Run torchrun with the flags of this process."""
    flags = torchrun_parser("python -m yivl.train.launch").parse_args(sys.argv[1:])
    _check_flags(flags)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if (flags.nproc_per_node or "").isdigit():  # else torchrun counts GPUs or cores
        share_cores(int(flags.nproc_per_node))
    # The rank that failed has logged its error in one line; torchrun would add lines of its own.
    logging.disable(logging.ERROR)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else f"error: rank {rank} was ended by signal {-first.exitcode}")
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _check_flags(flags: argparse.Namespace) -> None:
    """Check the flags of training before every rank reports the same error.

    Raises:
        YiVLError: If they are wrong.
    """
    nodes, processes = flags.nnodes or "1", flags.nproc_per_node or "1"
    if flags.module and flags.training_script == "yivl.train" and nodes.isdigit() and processes.isdigit():
        RunPlan.of(parse_arguments(flags.training_script_args), world_size=int(nodes) * int(processes))


if __name__ == "__main__":
    command_line.run(main)
