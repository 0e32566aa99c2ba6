"""Simulated CUDA devices: tensors that report ``cuda:N``, hold real values, and cannot be mixed with those of the host.

PyTorch has two neighbors of it. ``FakeTensorMode`` checks devices as well, but its tensors have no values, so that
sampling ends at the first token, and without a driver those on ``cuda`` have no backward pass. A device type in Python
(PrivateUse1) stays registered in the process. Here each tensor wraps one of the host, on which its operations run: what
a test computes is compared with the CPU. Not simulated: kernels, streams, memory limits, pinned memory, autocast, and
threads other than the one that entered the simulation.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from support.cuda_functions import Generators, replaced_functions

aten: Final = torch.ops.aten
HOST: Final = torch.device("cpu")

_INDEXING: Final = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
"""Operations whose indices may be on the host. Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp."""
_TAKES_SCALARS: Final = (*_INDEXING, aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.where)
"""Operations that take a 0-dimensional tensor of the host, beside the pointwise and the foreach operations."""


class DeviceTensor(torch.Tensor):
    """A tensor of a simulated device.

    To Python it is on ``cuda:N``, to the C++ code of PyTorch on ``meta:N``: autograd would ask the driver for the
    stream of a CUDA tensor.
    """

    is_cuda, is_cpu, is_meta = True, False, False
    host: torch.Tensor
    """The values."""
    simulation: "SimulatedCuda"

    @staticmethod
    def __new__(cls, value: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
        """Return a parameter: accelerate calls the class of the parameter that it replaces."""
        return torch.nn.Parameter(value, requires_grad)

    @classmethod
    def wrap(cls, host: torch.Tensor, device: torch.device, simulation: "SimulatedCuda") -> "DeviceTensor":
        """Return a tensor of a device with the values of one of the host."""
        assert host.device == HOST
        shell = torch.empty(0, dtype=host.dtype, device="meta")
        shell = shell.as_strided(host.shape, host.stride(), host.storage_offset())
        made: DeviceTensor = torch.Tensor._make_subclass(  # type: ignore[attr-defined]
            cls, shell, False, dispatch_device=True, device_for_backend_keys=device
        )
        made.host, made._device, made.simulation = host, device, simulation
        return made

    @property
    def device(self) -> torch.device:
        """The simulated device."""
        return self._device

    @property
    def data(self) -> torch.Tensor:
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if new.device != self.device:
            raise RuntimeError(f"data of a tensor on device {self.device} set to a tensor on {new.device}")
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.host = new.host

    def tolist(self) -> Any:
        """Return the values as numbers; PyTorch refuses subclasses."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array if ``force`` is set, as CUDA does."""
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()")
        return self.detach().cpu().numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what a file holds: the values, as of a tensor that is loaded to the host."""
        return self.host.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.host}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation outside of the simulation, in another thread for example."""
        simulation = next(leaf.simulation for leaf in _tensors([args, kwargs]) if isinstance(leaf, DeviceTensor))
        return simulation.run(func, args, kwargs or {})


class SimulatedCuda(TorchFunctionMode):
    """Simulates CUDA devices inside a ``with`` block, in the thread that entered it.

    An operation on tensors of several devices raises ``RuntimeError``, with the message of CUDA, unless CUDA takes it.

    Args:
        num_devices: Number of devices.
        num_bytes: Memory that each device reports; nothing limits the memory that is used.
    """

    def __init__(self, num_devices: int = 1, num_bytes: int = 2**33) -> None:
        super().__init__()
        self.transfers: Counter[tuple[str, str]] = Counter()
        """Number of copies from one type of device to another: ``("cpu", "cuda")``."""
        self._devices, self._generators = (num_devices, num_bytes), Generators()
        self._exits: list[ExitStack] = []

    def __enter__(self) -> "SimulatedCuda":
        with ExitStack() as stack:
            stack.enter_context(replaced_functions(*self._devices, self._generators))
            stack.enter_context(_Operations(self))
            super().__enter__()
            self._exits.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exits.pop().close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace CUDA devices in the arguments by what C++ code takes them for."""
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], args[1] if len(args) > 1 else kwargs.pop("device", 0))
        if func is torch.Tensor.to:
            args = (args[0], *(torch.device("cuda", value) if type(value) is int else value for value in args[1:]))
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        args, kwargs = _map(_to_shell, args), _map(_to_shell, kwargs)
        # A tensor that C++ code makes of Python's numbers has no values on meta.
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": HOST}).to(kwargs["device"])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of an operation of ATen, on the device that CUDA would return it on."""
        if func is torch.ops.prim.device.default:
            return torch.device("meta", args[0].device.index)
        with torch._C.DisableTorchFunction():
            return self._run(func, args, dict(kwargs))

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func.overloadpacket is aten.to or (kwargs.get("device") is not None and func._can_decompose()):
            with _Operations(self):
                return func.decompose(*args, **kwargs)
        is_copy, is_read = func in (aten.copy_.default, aten._to_copy.default), func is aten._local_scalar_dense.default
        device = args[0].device if is_copy else _common_device(func, args, kwargs)
        source = args[1].device if func is aten.copy_.default else device
        if kwargs.get("device") is not None:
            device = _from_shell(kwargs["device"])
        target = HOST if is_read else device
        if (is_copy or is_read) and source.type != target.type:
            self.transfers[source.type, target.type] += 1
        self._check_generator(kwargs.get("generator"), device)
        if device.type == "cuda":
            # The other kernels of attention have other names on the CPU than on CUDA.
            if func is aten._fused_sdp_choice.default:
                return SDPBackend.MATH.value
            kwargs |= {"device": HOST} if kwargs.get("device") is not None else {}
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        output = func(*_map(_to_host, args), **_map(_to_host, kwargs))
        if device.type != "cuda":
            return args[0] if func is aten.copy_.default else output
        with torch.inference_mode(False):  # a view of a tensor made outside of inference mode is one itself
            output = _map(lambda leaf: self._wrap(leaf, device), output)
        return return_and_correct_aliasing(func, args, kwargs, output)

    def _wrap(self, leaf: Any, device: torch.device) -> Any:
        return DeviceTensor.wrap(leaf, device, self) if isinstance(leaf, torch.Tensor) else leaf

    def _check_generator(self, generator: Any, device: torch.device) -> None:
        _, owner = self._generators.get(generator._cdata, (None, HOST)) if generator is not None else (None, device)
        if owner.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{owner.type}'")


class _Operations(TorchDispatchMode):
    """Passes operations to the simulation, those that make a tensor of nothing included."""

    def __init__(self, simulation: SimulatedCuda) -> None:
        super().__init__()
        self._simulation = simulation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._simulation.run(func, args, kwargs or {})


def _common_device(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of an operation's tensors, or the host without any.

    Raises:
        RuntimeError: If CUDA refuses the combination.
    """
    tensors = _tensors([args, kwargs])
    devices = {tensor.device for tensor in tensors}
    device = next((device for device in devices if device.type == "cuda"), None)
    if device is None:
        return tensors[0].device if tensors else HOST
    if len(devices) == 1:
        return device
    names = [argument.name for argument in func._schema.arguments]
    named, packet = {**dict(zip(names, args, strict=False)), **kwargs}, func.overloadpacket
    if packet in _INDEXING and named["self"].device.type == "cuda":
        named["indices"] = [index for index in named["indices"] if index is not None and index.device.type == "cuda"]
    takes_scalars = torch.Tag.pointwise in func.tags or packet in _TAKES_SCALARS or "_foreach_" in func.name()
    for tensor in _tensors(named):
        is_scalar = takes_scalars and tensor.device == HOST and tensor.ndim == 0
        if tensor.device != device and not is_scalar:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} (in {func})")
    return device


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested lists, tuples and dictionaries with a function applied to what they hold."""
    if isinstance(value, dict):
        return {key: _map(function, part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(function, part) for part in value)
    return function(value)


def _with_tensors(index: Any) -> Any:
    """Return an index with tensors for lists."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_with_tensors, index)) if isinstance(index, tuple) else index


def _to_shell(leaf: Any) -> Any:
    """Return ``meta:N`` for ``cuda:N``, a device or its name."""
    if isinstance(leaf, str | torch.device) and str(leaf).partition(":")[0] == "cuda":
        return torch.device("meta", torch.device(leaf).index or 0)
    return leaf


def _from_shell(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index) if device.type == "meta" and device.index is not None else device


def _to_host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, DeviceTensor) else leaf
