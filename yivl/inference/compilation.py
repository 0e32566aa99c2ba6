"""Compilation of the decoding step with ``torch.compile``, for programs that decode for longer than it takes."""

import dataclasses
import logging
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

import torch
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import YiVLError
from yivl.inference.cuda_graphs import CudaCapture, DecodingGraphs, can_capture, graph_size, warm_up
from yivl.inference.decoding import DecodingFunctions, DecodingStep, decode_head, decode_layer, supports
from yivl.inference.kv_cache import make_cache
from yivl.model.modeling import YiVLForCausalLM

logger = logging.getLogger(__name__)

Compiled = Callable[..., torch.Tensor]

_NUM_ROWS: Final = (1, 3)
"""Batch sizes of the steps that compile: one row has code of its own, several rows share one for any number."""

_NUM_POSITIONS: Final = 1100
"""Cached positions of these steps: of a prompt with an image. Inductor chooses loops for about this length."""

_CUDA_OPTIONS: Final[dict[str, str | int | bool | Callable[..., Any]]] = {"coordinate_descent_tuning": True}
"""Lets Inductor generate the products of a matrix and one row, fused with what comes before and after.
Source: torch/_inductor/decomposition.py, which writes such products as sums under this option."""


def check_compiler() -> None:
    """Check that there is a C++ compiler.

    Raises:
        YiVLError: If there is none.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise YiVLError(
            "--compile needs a C++ compiler and finds none; install g++, set CXX to a compiler, or leave out --compile"
        ) from error


@torch.inference_mode()
def compile_decoding(loaded: LoadedModel) -> LoadedModel:
    """Return the model with a compiled decoding step; nothing is compiled later.

    The functions of a layer and of the head are compiled, for one row and for several; all layers and all lengths
    share the code. On a CUDA GPU the steps are CUDA graphs of these functions, where the model allows it.

    Raises:
        YiVLError: If the decoding step does not support the model, or PyTorch cannot compile on this machine.
    """
    start = time.perf_counter()
    if not supports(loaded.model) or loaded.model.device.type not in ("cpu", "cuda"):
        raise YiVLError("--compile needs sdpa attention and one device, the CPU or a CUDA GPU; leave out --compile")
    check_compiler()
    options = _CUDA_OPTIONS if loaded.model.device.type == "cuda" else None
    layer, head = (torch.compile(_copy(function), options=options) for function in (decode_layer, decode_head))
    # What the compiled code does not cover runs without it: nothing is compiled while a request waits.
    run_only = torch.compiler.set_stance("eager_on_recompile")
    functions = (run_only(layer), run_only(head))
    try:
        graphs = _capture(loaded.model, layer, head, functions) if loaded.model.device.type == "cuda" else None
        if graphs is None:
            for num_rows in _NUM_ROWS:
                _run_steps(dataclasses.replace(loaded, decoding_functions=_for_any_size(layer, head)), num_rows)
    except TorchDynamoException as error:
        reason = _first_line(error)
        raise YiVLError(f"--compile: PyTorch cannot compile on this machine ({reason}); leave out --compile") from error
    logger.info("compiled the decoding step in %.0f s", time.perf_counter() - start)
    if graphs is not None:
        return dataclasses.replace(loaded, decoding_graphs=graphs)
    return dataclasses.replace(loaded, decoding_functions=functions)


def _copy(function: Compiled) -> Compiled:
    """Return a function with a code object of its own, by which Dynamo keeps compiled code and counts it."""
    # isolate_recompiles of torch.compile does the same; PyTorch before 2.14 does not have it.
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _capture(
    model: YiVLForCausalLM, layer: Compiled, head: Compiled, functions: DecodingFunctions
) -> DecodingGraphs | None:
    """Return CUDA graphs of compiled functions, or ``None`` if the model's steps cannot be captured."""
    if not can_capture(model):
        logger.info("decoding without CUDA graphs: 8-bit layers or dynamic position embeddings wait for the GPU")
        return None
    graphs = DecodingGraphs(model, functions, CudaCapture(model.device))
    try:
        for num_rows in _NUM_ROWS:
            # On the sizes of graphs: compiled code may depend on what divides them.
            warm_up(model, _for_any_size(layer, head), *graph_size(num_rows, _NUM_POSITIONS))
        graphs.prepare(1, _NUM_POSITIONS)
    except TorchDynamoException:
        raise
    except RuntimeError as error:  # what CUDA refuses during a capture, or too little memory
        logger.info("decoding without CUDA graphs: %s", _first_line(error))
        return None
    return graphs


def _run_steps(loaded: LoadedModel, num_rows: int) -> None:
    """Run decoding steps of a batch as requests do."""
    model, cache = loaded.model, make_cache()
    model(input_ids=torch.ones(num_rows, 2, dtype=torch.int64, device=model.device), past_key_values=cache)
    for index, cached in enumerate(cache.layers):
        states = torch.zeros_like(cached.keys[:, :, :1]).expand(-1, -1, _NUM_POSITIONS, -1)
        cache.update(states, states, index)
    step = DecodingStep(loaded, [cache.get_seq_length()] * num_rows)
    for _ in range(2):
        step([1] * num_rows, cache)


def _for_any_size(layer: Compiled, head: Compiled) -> tuple[Compiled, Compiled]:
    """Return the functions such that they are compiled for any number of positions, and of rows beyond one."""

    def run_layer(module: Any, hidden: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        _, _, keys, values, mask, *_ = tensors
        _mark_rows(hidden, *tensors)
        for tensor, positions in ((keys, 2), (values, 2), (mask, 3)):
            if tensor is not None:
                maybe_mark_dynamic(tensor, positions)
        return layer(module, hidden, *tensors)

    def run_head(norm: Any, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        _mark_rows(hidden)
        return head(norm, module, hidden)

    return run_layer, run_head


def _mark_rows(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:
            maybe_mark_dynamic(tensor, 0)
