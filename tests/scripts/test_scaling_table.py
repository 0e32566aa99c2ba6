"""The formulas of docs/scaling.md: FLOP against PyTorch's counter, bytes against the definition of the collectives."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, ROOT
from torch.utils.flop_counter import FlopCounterMode

from yivl.checkpoint.folder import read_config
from yivl.model.modeling import YiVLForCausalLM


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return ROOT / "scripts"


@pytest.mark.parametrize("trains_decoder", [False, True])
@pytest.mark.usefixtures("scripts")
def test_the_flop_of_a_sample_are_those_that_pytorch_counts(trains_decoder: bool) -> None:
    from scaling_table import flop_per_sample

    config = read_config(CHECKPOINT)
    config._attn_implementation = "eager"  # its products are counted, those of the fused kernel of a CPU are not
    model: Any = YiVLForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trains_decoder or "vision_tower" in name or "mm_projector" in name
    text = torch.arange(10, 50)
    ids = torch.cat([torch.tensor([-200]), text])[None]
    size = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter:
        images, labels = torch.randn(1, 3, size, size), ids.masked_fill(ids < 0, -100)
        model(input_ids=ids, labels=labels, images=images, skip_logits=True).loss.backward()
    expected = flop_per_sample(config, len(text), trains_decoder=trains_decoder, recomputes=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.usefixtures("scripts")
def test_a_rank_sends_what_ring_collectives_send() -> None:
    from measure_communication import bytes_per_step

    # 10 parameters, 6 of them trained; 4 ranks; weights of 2 bytes, gradients of 4: 3/4 of each buffer is sent.
    sent = {name: bytes_per_step(name, 10, 6, 4, 2, 4) for name in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")}
    assert sent == {"DDP": 36, "ZeRO-2": 27, "ZeRO-3": 48, "FSDP2": 48}


def test_the_tables_of_the_page_are_those_of_the_script() -> None:
    command = [sys.executable, "scripts/scaling_table.py"]
    tables = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert len(tables.split("\n\n")) >= 4
    for table in tables.strip().split("\n\n"):
        assert table in page


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_the_configuration_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```nginx\n(.*?)```", page, flags=re.DOTALL)
    settings = f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}} http {{ access_log off; {block} }}"
    (tmp_path / "nginx.conf").write_text(settings)
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
