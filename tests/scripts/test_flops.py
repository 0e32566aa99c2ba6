"""The FLOPs of scripts/flops.py against those that PyTorch counts, and the arithmetic of MFU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, ROOT
from support.golden_internvl import CHECKPOINT as INTERNVL
from torch.utils.flop_counter import FlopCounterMode

from yivl.checkpoint.folder import read_config
from yivl.model.architectures import model_class
from yivl.train import parameters
from yivl.train.arguments import parse_arguments


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, INTERNVL], ids=["yi-vl", "internvl"])
@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ("--stage 3", {"vision_tower": True, "projector": True, "language_model": True}),
        ("--stage 1", {"vision_tower": True, "projector": True}),
        ("--tune_mm_mlp_adapter True", {"projector": True}),
        ("", {"projector": True, "language_model": True}),
        ("--freeze_mm_mlp_adapter True", {"language_model": True}),
        ("--lora_enable True --freeze_mm_mlp_adapter True", {"lora_rank": 8}),
        ("--lora_enable True --lora_r 4", {"projector": True, "lora_rank": 4}),
    ],
)
def test_the_flops_of_a_sample_are_those_that_pytorch_counts(
    flags: str, trained: dict[str, Any], checkpoint: Path
) -> None:
    from flops import Trained, training_flops

    parsed = parse_arguments(f"--model_name_or_path m --data_path d --output_dir o {flags}".split())
    config = read_config(checkpoint)
    config._attn_implementation = "eager"  # its products are counted, those of the fused kernel of a CPU are not
    model: Any = model_class(config)(config).train()
    if parsed.model.lora_enable:
        model = parameters.add_adapters(model, parsed.model, base="m")
    parameters.select_trainable(model, parsed.model, config.num_vision_layers)
    text = torch.arange(10, 50)
    ids = torch.cat([torch.tensor([-200]), text])[None]
    size = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter:
        images, labels = torch.randn(1, 3, size, size), ids.masked_fill(ids < 0, -100)
        model(input_ids=ids, labels=labels, images=images, skip_logits=True).loss.backward()
    expected = training_flops(config, config.num_patches + len(text), len(text), Trained(**trained), causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_a_causal_mask_leaves_half_of_the_attention() -> None:
    from flops import ForwardFlops

    config = read_config(CHECKPOINT)
    all_pairs, causal = (ForwardFlops.of(config, 100, 10, causal=causal) for causal in (False, True))
    assert all_pairs.attention == 2 * causal.attention > 0
    assert all_pairs.decoder == causal.decoder


def test_utilization_is_the_share_of_the_rate() -> None:
    from flops import utilization

    assert utilization(6e12, 0.02, 600e12) == pytest.approx(0.5)
    assert utilization(6e12, 0.02, None) is None


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("an unknown GPU", None),
    ],
)
def test_the_peak_rate_is_that_of_the_name(gpu: str, rate: float | None) -> None:
    from flops import peak_rate

    assert peak_rate(gpu) == rate
