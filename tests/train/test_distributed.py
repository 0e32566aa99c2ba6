"""The launcher, and DeepSpeed on several ranks, which must all run the same modules in the same order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.golden import CHECKPOINT
from support.training import flags, losses, write_shards

from yivl.train.run_log import read_log


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [("sys.exit(3)", 3, ""), ("os.kill(os.getpid(), signal.SIGKILL)", 1, "error: rank 0 was ended by signal 9\n")],
)
def test_the_launcher_exits_as_the_rank_that_failed(code: str, exit_code: int, stderr: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(f"import os, signal, sys\n{code}\n")
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (exit_code, stderr)


# Ranks differ in whether their batch has an image and in their number of logit chunks (1 and 3).
WORKER = """
import sys
import deepspeed, torch
from transformers import TrainingArguments
from yivl.checkpoint.folder import read_config
from yivl.model.modeling import YiVLForCausalLM

adam = {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}}
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
config = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 2, "zero_optimization": zero, "optimizer": adam}
arguments = TrainingArguments(output_dir=sys.argv[2], use_cpu=True, deepspeed=config, per_device_train_batch_size=1)
deepspeed.init_distributed(dist_backend="gloo")
with deepspeed.zero.Init(config_dict_or_path=config):
    model = YiVLForCausalLM(read_config(sys.argv[1]))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
rank = torch.distributed.get_rank()
for step in range(3):
    has_image = (rank + step) % 2 == 0
    row = [294, 332, 725, -200, 19, 748] if has_image else [294, 332, 725, 694, 619, 268] * (400 if step == 1 else 1)
    ids, images = torch.tensor([row]), torch.randn(1, 3, 56, 56) if has_image else None
    labels = ids.masked_fill(ids < 0, -100)
    engine.train()
    loss = engine(input_ids=ids, images=images, labels=labels).loss
    engine.backward(loss)
    engine.step()
    engine.eval()
    with torch.no_grad():
        engine(input_ids=ids[:, :6], images=images)
    sys.stdout.write(f"[rank {rank} step {step} loss {loss.item():.3f}]")
    sys.stdout.flush()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU operators with g++")
def test_zero3_ranks_with_and_without_images_train_and_evaluate_together(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    result = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(CHECKPOINT), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    steps = re.findall(r"\[rank (\d) step (\d) loss \d+\.\d+\]", result.stdout)
    assert sorted(steps) == [(str(rank), str(step)) for rank in range(2) for step in range(3)]


@pytest.mark.slow
def test_streams_of_two_ranks_resume_exactly_and_on_one_rank(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "shards", 3, 8)

    def run(name: str, ranks: int, **changes: Any) -> list[float]:
        common: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "shuffle_buffer": 4, "use_cpu": True, "bf16": False}
        command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", str(ranks)]
        arguments = flags(tmp_path / name, data, **common | changes)
        result = subprocess.run(
            [*command, "-m", "yivl.train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return losses(read_log(tmp_path / name / "log.jsonl"))

    whole = run("whole", 2, dataloader_num_workers=1)
    position = json.loads((tmp_path / "whole/checkpoint-2/data_position.json").read_text())
    assert [stream["rows"] for stream in position["streams"]] == [4, 4]
    for name in ("resumed", "alone"):
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / name / "checkpoint-2")
    assert run("resumed", 2, dataloader_num_workers=1, resume="auto") == whole[2:]
    assert len(run("alone", 1, gradient_accumulation_steps=2, resume="auto")) == 2
    (stream,) = json.loads((tmp_path / "alone/checkpoint-4/data_position.json").read_text())["streams"]
    assert stream["rows"] == 8
