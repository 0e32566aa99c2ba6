"""The operators that DeepSpeed compiles at their first use on a machine, silently and for up to minutes."""

import os
from pathlib import Path

import torch

from yivl.train.plan import Zero


def describe_compilation(zero: Zero) -> str | None:
    """Return a line on the operators that a run is going to compile, or ``None`` if all are compiled.

    Seconds measured on two idle cores: 31 for ``deepspeed_shm_comm``, 50 for ``cpu_adam``.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    # Source: deepspeed.comm.torch.build_shm_op; deepspeed.ops.adam.DeepSpeedCPUAdam.
    needed = [] if torch.cuda.is_available() else ["deepspeed_shm_comm"]
    needed += ["cpu_adam"] if zero.offloads_optimizer else []
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    missing = [name for name in needed if not installed_ops.get(name) and not any(folder.glob(f"**/{name}/{name}.so"))]
    if not missing:
        return None
    names = " and ".join(missing)
    return f"DeepSpeed compiles {names}, about a minute each, once on this machine, into {folder}"
