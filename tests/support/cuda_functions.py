"""The functions of ``torch.cuda`` that libraries call, replaced for simulated devices (``support.devices``)."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import accelerate.utils.imports
import torch
import torch._dynamo  # optimizers import it: here it does not find the replaced functions
import transformers.utils.import_utils
from torch import __future__ as conversion


class ReachedError(Exception):
    """Ends the code under test where it would use a GPU."""


Generators = dict[int, tuple[torch.Generator, torch.device]]
"""The devices of generators, by the address of their C++ object; C++ code makes other Python objects of one."""


@contextmanager
def replaced_functions(num_devices: int, num_bytes: int, generators: Generators) -> Iterator[None]:
    """Replace what asks for devices, inside the block.

    Args:
        num_devices: Number of devices.
        num_bytes: Memory that each device reports.
        generators: Receives the generators that are made inside the block.
    """
    state: dict[str, Callable[..., Any]] = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: num_devices,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (num_bytes, num_bytes),
    }
    stream = mock.Mock()
    stream.is_capturing.return_value = False
    with ExitStack() as stack:
        # The library loads weights in threads, which are not in the simulation.
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        stack.enter_context(mock.patch.object(torch, "Generator", _generator_class(generators)))
        # The module has its own device_count; a real GPU has no generators before CUDA is initialized.
        stack.enter_context(mock.patch.multiple(torch.cuda.random, **state, device_count=lambda: 0))
        stack.enter_context(mock.patch.multiple(torch.cuda, **state, **functions))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", return_value=stream))
        for module in (accelerate.utils.imports, transformers.utils.import_utils):
            stack.callback(_forget, module)
            _forget(module)
        # Module.to keeps its parameters, which optimizers hold; their data cannot be set to a tensor of another class.
        before = conversion.get_swap_module_params_on_conversion()
        stack.callback(conversion.set_swap_module_params_on_conversion, before)
        conversion.set_swap_module_params_on_conversion(True)
        yield


def _generator_class(generators: Generators) -> type[torch.Generator]:
    """Return the class of generators that run on the host, each of which belongs to a device."""

    class Generator(torch.Generator):
        def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
            made = super().__new__(cls, "cpu")
            generators[made._cdata] = made, torch.device(device)  # type: ignore[attr-defined]
            return made

    return Generator


def _forget(module: ModuleType) -> None:
    """Clear what the functions of a module remember, such as whether there is a GPU."""
    for function in vars(module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
