"""Start one process per GPU as torchrun does, and exit with the code of the rank that failed.

python -m yivl.train.launch --nproc-per-node 8 -m yivl.train FLAGS
"""

import logging
import sys

from yivl import command_line
from yivl.train.flags import torchrun_parser


def main() -> None:
    """Run torchrun with the flags of this process."""
    torchrun_parser("python -m yivl.train.launch").parse_args(sys.argv[1:])

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # The rank that failed has logged its error in one line; torchrun would add lines of its own.
    logging.disable(logging.ERROR)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else f"error: rank {rank} was ended by signal {-first.exitcode}")
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    command_line.run(main)
