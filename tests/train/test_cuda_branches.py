"""Branches of training that only a machine with GPUs takes: placement, NCCL, precision, optimizers; without one.

PyTorch is told that there are GPUs only where a test says so; no test computes on them.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from bitsandbytes.optim.optimizer import GlobalOptimManager
from support.cuda_functions import ReachedError
from support.golden import CHECKPOINT, ROOT
from support.models import wide_checkpoint
from support.training import IMAGES, losses, train, write_rows
from torch import distributed
from transformers import TrainingArguments

from yivl import command_line
from yivl.conversation import YI_VL
from yivl.data.encoding import Encoder
from yivl.errors import CheckpointError, YiVLError
from yivl.eval.__main__ import _load
from yivl.model.modeling import YiVLForCausalLM
from yivl.train import run
from yivl.train.arguments import Arguments, DataArguments, ModelArguments, parse_arguments
from yivl.train.dataloaders import make_batches
from yivl.train.initialization import load_start, read_start
from yivl.train.plan import RunPlan, prepare_environment, trainer_arguments
from yivl.train.ranks import leave_group

QLORA = ModelArguments(model_name_or_path=str(CHECKPOINT), lora_enable=True, bits=4)


def parse(*given: str) -> Arguments:
    return parse_arguments(["--model_name_or_path", str(CHECKPOINT), "--data_path", "d", "--output_dir", "o", *given])


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Two GPUs, as PyTorch reports them; yields the list of those that are chosen."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield chosen
    AcceleratorState._reset_state(reset_partial_state=True)


# Where weights are placed.


@pytest.mark.parametrize(
    ("device", "bits", "device_map"),
    [("cuda:1", 4, {"": "cuda:1"}), ("cuda:0", 8, {"": "cuda:0"}), ("cuda:1", 16, None), ("cpu", 8, {"": "cpu"})],
)
def test_quantized_weights_are_loaded_onto_the_device_of_the_rank(
    device: str, bits: int, device_map: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")  # with a GPU per rank made visible, the device of every rank is cuda:0
    given: dict[str, Any] = {}

    def from_pretrained(folder: Path, **kwargs: Any) -> None:
        given.update(kwargs)
        raise ReachedError

    monkeypatch.setattr(YiVLForCausalLM, "from_pretrained", from_pretrained)
    arguments = ModelArguments(model_name_or_path=str(CHECKPOINT), lora_enable=True, bits=bits)
    start = read_start(arguments, device=torch.device(device))
    with pytest.raises(ReachedError):
        load_start(start, arguments, dtype=torch.bfloat16, packing=True, device=torch.device(device))
    assert (given["device_map"], given["bits"], given["dtype"]) == (device_map, bits, torch.bfloat16)
    assert given["attn_implementation"] == "sdpa_packed"


def test_layers_of_any_width_are_quantized_to_4_bits_on_a_gpu() -> None:
    read_start(QLORA, device=torch.device("cuda", 0))
    with pytest.raises(CheckpointError, match="on a CPU needs layer widths that are multiples of 64"):
        read_start(QLORA, device=torch.device("cpu"))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("use_cpu", [False, True])
def test_a_run_on_the_cpu_of_a_machine_with_gpus_uses_none(
    use_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is restored
    monkeypatch.delenv("DS_ACCELERATOR")
    training = parse("--use_cpu", str(use_cpu)).training
    prepare_environment(training)
    assert os.environ.get("DS_ACCELERATOR") == ("cpu" if use_cpu else None)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=use_cpu)
    data = DataArguments(data_path=str(write_rows(tmp_path / "rows.json")), image_folder=str(IMAGES))
    start = read_start(ModelArguments(model_name_or_path=str(CHECKPOINT)))
    encoder = Encoder(start.tokenizer, start.image_processor, 16, 2048, YI_VL)
    assert make_batches(data, args, encoder, pytest.fail).loader.pin_memory is not use_cpu


@pytest.mark.usefixtures("gpus")
def test_ranks_of_an_evaluation_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "load", lambda arguments: arguments.device)
    for rank, device in (("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert _load(argparse.Namespace(device="auto")) == device
        assert _load(argparse.Namespace(device="cpu")) == "cpu"


# Ranks.


@pytest.fixture
def rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the second rank of two."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("rank_1")
def test_ranks_on_gpus_meet_by_nccl_and_have_a_gpu_each(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "init_process_group", lambda **kwargs: groups.append(kwargs))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    arguments = parse("--bf16", "True", "--ddp_timeout", "77")
    args = trainer_arguments(arguments, RunPlan.of(arguments))
    assert groups == [{"backend": "nccl", "timeout": timedelta(seconds=77)}]
    assert gpus == [torch.device("cuda:1")]
    assert (args.device, args.process_index, args.n_gpu) == (torch.device("cuda:1"), 1, 1)


@pytest.mark.parametrize(("device", "backend"), [("cuda:0", "nccl"), ("cpu", "gloo")])
def test_deepspeed_connects_the_ranks_by_the_backend_of_their_device(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def init_distributed(**kwargs: Any) -> None:
        given.update(kwargs)
        raise ReachedError

    module = ModuleType("deepspeed")
    vars(module)["init_distributed"] = init_distributed
    monkeypatch.setitem(os.sys.modules, "deepspeed", module)  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "describe_compilation", lambda zero: None)
    args = SimpleNamespace(device=torch.device(device), process_index=0, ddp_timeout_delta=timedelta(seconds=77))
    monkeypatch.setattr(run, "trainer_arguments", lambda *_: args)
    arguments = parse("--deepspeed", str(ROOT / "scripts/zero2.json"))
    with ExitStack() as resources, pytest.raises(ReachedError):
        run.prepare(arguments, RunPlan.of(arguments), resources)
    assert given == {"dist_backend": backend, "timeout": timedelta(seconds=77)}


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [1]), ("gloo", None)])
def test_the_last_barrier_names_the_gpu(
    backend: str, devices: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(distributed, "barrier", lambda device_ids=None: done.append(device_ids))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("left"))
    leave_group()
    assert done == [devices, "left"]


@pytest.mark.usefixtures("gpus")
def test_a_process_that_sees_several_gpus_is_refused() -> None:
    arguments = parse()
    with pytest.raises(YiVLError, match="2 GPUs in one process: start one process each with a script of scripts/"):
        trainer_arguments(arguments, RunPlan.of(arguments))


# Precision.


@pytest.mark.usefixtures("gpus")
def test_a_gpu_without_bfloat16_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    arguments = parse("--bf16", "True")
    with pytest.raises(YiVLError, match=r"compute capability 7\.5\) has no bfloat16; give --bf16 False --fp16 True"):
        trainer_arguments(arguments, RunPlan.of(arguments))
    arguments = parse("--bf16", "True", "--use_cpu", "True")
    assert trainer_arguments(arguments, RunPlan.of(arguments)).device.type == "cpu"


@pytest.mark.parametrize(("given", "precision"), [("True", "tf32"), ("False", "ieee"), (None, None)])
def test_tf32_is_what_the_flag_says_and_else_the_default_of_pytorch(
    given: str | None, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = torch.backends
    assert (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision) == ("none", "tf32")
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    arguments = parse("--use_cpu", "True", *([] if given is None else ["--tf32", given]))
    trainer_arguments(arguments, RunPlan.of(arguments))
    found = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    assert found == (("none", "tf32") if precision is None else (precision, precision))


# Optimizers.


@pytest.mark.slow
def test_a_paged_8_bit_optimizer_trains_and_resumes_exactly(tmp_path: Path) -> None:
    """On a CPU, bitsandbytes has the same states, without pages."""
    wide, rows = wide_checkpoint(tmp_path / "wide"), write_rows(tmp_path / "rows.json")
    settings: dict[str, Any] = {"model_name_or_path": wide, "lora_enable": True, "lora_r": 64, "bits": 4}
    settings |= {"optim": "paged_adamw_8bit", "max_steps": 4, "save_steps": 2}
    whole = losses(train(tmp_path / "whole", rows, **settings))
    resumed = train(tmp_path / "resumed", rows, **settings, resume=tmp_path / "whole/checkpoint-2")
    assert losses(resumed) == whole[2:]
    saved = torch.load(tmp_path / "whole/checkpoint-2/optimizer.pt", weights_only=True)
    assert any(is_quantized(state) for state in saved["state"].values())


def is_quantized(state: dict[str, Any]) -> bool:
    return "absmax1" in state["__bnb_optimizer_quant_state__"]


@pytest.mark.slow
def test_an_8_bit_optimizer_keeps_the_states_of_embeddings_in_32_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)  # one per process
    rows = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", rows, optim="adamw_bnb_8bit", max_steps=1, per_device_train_batch_size=8)
    saved = torch.load(tmp_path / "out/checkpoint-1/optimizer.pt", weights_only=True)["state"].values()
    states = [(is_quantized(state), state["__bnb_optimizer_quant_state__"]["state1"]) for state in saved]
    embeddings = [(quantized, value.dtype) for quantized, value in states if value.shape == (1024, 64)]
    # The head has the shape of the embeddings.
    assert sorted(embeddings, key=str) == [(False, torch.float32), (True, torch.uint8)]
