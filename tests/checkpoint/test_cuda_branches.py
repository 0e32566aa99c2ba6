"""Branches of loading that only a machine with GPUs takes: devices, quantization by bitsandbytes; without one.

PyTorch is told that there are GPUs only where a test says so; no test computes on them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda_functions import ReachedError
from support.golden import CHECKPOINT
from support.models import wide_checkpoint
from transformers import PreTrainedModel

from yivl.checkpoint.loading import UNQUANTIZED_MODULES, load_model
from yivl.checkpoint.support import parse_device
from yivl.errors import YiVLError
from yivl.inference.decoding import supports
from yivl.model.modeling import YiVLForCausalLM


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as PyTorch reports them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_named_by_a_number_that_exists() -> None:
    assert parse_device("auto") == "auto"  # over all of them
    assert [parse_device(name) for name in ("cuda", "cuda:1")] == [{"": "cuda"}, {"": "cuda:1"}]
    with pytest.raises(YiVLError, match="device='cuda:2': PyTorch finds no such device on this machine"):
        parse_device("cuda:2")


def test_no_gpu_is_found_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert parse_device("auto") == {"": "cpu"}
    with pytest.raises(YiVLError, match="device='cuda': PyTorch finds no such device on this machine"):
        parse_device("cuda")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "compute"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_quantization_on_a_gpu_is_that_of_bitsandbytes(
    bits: int, dtype: Any, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(_: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise ReachedError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", from_pretrained)
    with pytest.raises(ReachedError):
        load_model(CHECKPOINT, device="cuda:1", dtype=dtype, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    assert (given["device_map"], given["dtype"], given["attn_implementation"]) == ({"": "cuda:1"}, dtype, "sdpa")
    config = given["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == compute
    assert (
        config.llm_int8_skip_modules == UNQUANTIZED_MODULES == ["model.vision_tower", "model.mm_projector", "lm_head"]
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_that_exceeds_the_gpus_is_a_lack_of_memory(bits: int, tmp_path: Path) -> None:
    """What ``device_map="auto"`` plans then: bitsandbytes cannot offload to the CPU."""
    plan = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(MemoryError, match="wide: the GPUs are too small for the quantized model"):
        YiVLForCausalLM.from_pretrained(wide_checkpoint(tmp_path / "wide"), bits=bits, device_map=plan)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_decoding_step_supports_layers_of_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """accelerate adds no hooks to a model on one device, which would exclude it."""
    folder = wide_checkpoint(tmp_path / "wide")
    model = YiVLForCausalLM.from_pretrained(folder, bits=bits, device_map={"": "cpu"}).eval()
    assert supports(model)
