"""CPU threads of training and evaluation, so that processes on the same cores do not wait for each other."""

import os


def let_idle_threads_sleep() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before PyTorch is imported.

    A spinning thread occupies a core that another process or thread needs. Training with LoRA on two cores shared with
    other programs: 0.8 samples/s with spinning threads, 4 without; on two idle cores 13 and 12. Source: ours; see
    docs/benchmarks.md. A value of ``OMP_WAIT_POLICY`` in the environment is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def local_world_size() -> int:
    """Return the number of processes that torchrun or DeepSpeed's launcher started on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def share_cores(num_processes: int) -> int:
    """Divide PyTorch's threads among the processes of this node, and return the number of threads of each.

    A value of ``OMP_NUM_THREADS`` in the environment is kept; otherwise it is set, since torchrun starts ranks with one
    thread unless it is.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // num_processes, 1))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return torch.get_num_threads()


def describe_threads() -> str:
    """Return a line on the CPU threads of a run."""
    import torch

    idle = "sleep" if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else "spin"
    return (
        f"CPU threads: {torch.get_num_threads()} x {local_world_size()} processes; idle threads {idle} "
        "(set OMP_NUM_THREADS, OMP_WAIT_POLICY to change this)"
    )
