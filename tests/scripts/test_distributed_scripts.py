"""The shell scripts at tiny scale on several ranks and nodes: DeepSpeed, Slurm, a host file."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, ROOT
from support.serving import free_port
from support.training import (
    losses,
    run_script,
    script_flags,
    weights,
    write_rows,
)

from yivl.checkpoint.folder import read_all_weights, read_config
from yivl.checkpoint.loading import load_model
from yivl.export.hf import to_hf
from yivl.train.resume import finished_checkpoints
from yivl.train.run_log import read_log

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its operators with g++")


# Adam normalizes gradients near zero, and so their rounding errors; a large epsilon avoids that.
COMPARED: dict[str, Any] = {"learning_rate": 1e-3, "num_train_epochs": 2, "save_steps": 3, "adam_epsilon": 1e-2}


def run_zero(settings: str, out: Path, rows: Path, model: Path = CHECKPOINT, **changes: Any) -> list[float]:
    run_script(
        "finetune.sh",
        *script_flags(model, rows, out, **COMPARED, **changes),
        PROCESSES=2,
        GLOBAL_BATCH=2,
        MASTER_PORT=free_port(),
        DEEPSPEED=settings,
    )
    return losses(read_log(out / "log.jsonl"))


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows with and without images, and the run of one process over them."""
    folder = tmp_path_factory.mktemp("single")
    rows = write_rows(folder / "rows.json")
    run_script(
        "finetune.sh",
        *script_flags(CHECKPOINT, rows, folder / "out", **COMPARED, freeze_mm_mlp_adapter=False),
        GLOBAL_BATCH=2,
        MICRO_BATCH=2,
    )
    return rows, folder / "out"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("settings", ["", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_two_ranks_match_one_and_resume_bit_exactly(
    settings: str, single_process: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, single = single_process
    path = f"scripts/{settings}.json" if settings else ""
    whole = run_zero(path, tmp_path / "whole", rows, freeze_mm_mlp_adapter=False)
    assert whole == pytest.approx(losses(read_log(single / "log.jsonl")), rel=2e-4)
    expected, found = weights(single), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3)
    if "offload" in settings:
        return
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", resumed / "checkpoint-3")
    log = run_zero(path, resumed, rows, freeze_mm_mlp_adapter=False, resume="auto")
    assert log == whole[3:]
    after = weights(resumed)
    assert all(torch.equal(value, after[name]) for name, value in found.items())


@pytest.mark.slow
@needs_compiler
def test_ranks_under_zero3_start_from_the_hf_format(single_process: tuple[Path, Path], tmp_path: Path) -> None:
    """Its weights are renamed in memory, on every rank, before they are partitioned."""
    rows, single = single_process
    to_hf(CHECKPOINT, tmp_path / "hf")
    flags: dict[str, Any] = {"freeze_mm_mlp_adapter": False, "max_steps": 1}
    log = run_zero("scripts/zero3.json", tmp_path / "out", rows, tmp_path / "hf", **flags)
    assert log == pytest.approx(losses(read_log(single / "log.jsonl"))[:1], rel=2e-4)
    expected, found = read_all_weights(CHECKPOINT, read_config(CHECKPOINT)), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():  # one step moves each by at most the learning rate
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("settings", ["zero2", "zero3"])
def test_adapters_train_under_deepspeed_and_resume_bit_exactly(settings: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")

    def run(out: Path, **changes: Any) -> list[float]:
        common: dict[str, Any] = {
            "freeze_mm_mlp_adapter": False,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "save_steps": 3,
        }
        run_script(
            "finetune_lora.sh",
            *script_flags(CHECKPOINT, rows, out, **common | changes),
            PROCESSES=2,
            GLOBAL_BATCH=2,
            MASTER_PORT=free_port(),
            DEEPSPEED=f"scripts/{settings}.json",
        )
        return losses(read_log(out / "log.jsonl"))

    whole = run(tmp_path / "whole")
    assert whole[-1] < whole[0]
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    assert run(tmp_path / "resumed", resume="auto") == whole[3:]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(".lora_B." in name and value.any() for name, value in first.items())
    assert "model.mm_projector.0.weight" in first
    load_model(tmp_path / "whole", device="cpu")


def slurm(stubs: Path) -> dict[str, Any]:
    """Return the environment of a job of two nodes, both on this machine: stubs start them."""
    stubs.mkdir()
    (stubs / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {stubs}/scontrol.log\necho 127.0.0.1\n')
    # Like Slurm's, it forwards SIGUSR1 to its tasks, and exits with their largest exit code.
    (stubs / "srun").write_text(
        f"#!/bin/bash\necho $SRUN_CPUS_PER_TASK > {stubs}/cpus\n"
        """
SLURM_NODEID=1 "$@" >/dev/null 2>&1 &
second=$!
SLURM_NODEID=0 "$@" &
first=$!
trap 'kill -USR1 $first $second' USR1
code=0
for task in $first $second; do
  wait $task
  one=$?
  while kill -0 $task 2>/dev/null; do wait $task; one=$?; done
  code=$((one > code ? one : code))
done
exit $code
"""
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    path = f"{stubs}:{os.environ['PATH']}"
    return {
        "SLURM_NNODES": 2,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": 7,
        "SLURM_CPUS_PER_TASK": 96,
        "PATH": path,
    }


def requeues(stubs: Path) -> int:
    return (stubs / "scontrol.log").read_text().splitlines().count("requeue 7")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_has_a_slurm_job(stage: int, tmp_path: Path) -> None:
    environment = slurm(tmp_path / "bin") | {"MODEL": "m", "VIT": "v", "DATA": "d", "OUT": "o", "DRY_RUN": 1, "GPUS": 8}
    printed = run_script(f"slurm/train_stage{stage}.sbatch", "--max_steps", 7, **environment, GLOBAL_BATCH=4096)
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 0" in printed
    assert f"stage:\\ {stage}\\," in printed  # quoted for the shell
    assert printed.endswith(" --resume auto --dataloader_num_workers 8 --max_steps 7 \n")
    assert requeues(tmp_path / "bin") == 0
    # srun does not read SLURM_CPUS_PER_TASK. Source: release notes of Slurm 22.05.
    assert (tmp_path / "bin/cpus").read_text() == "96\n"


@pytest.mark.parametrize("job", ["finetune_v1_2", "finetune_v1_2_again", "pretrain_v1_2"])
def test_every_script_of_internvl_for_several_nodes_has_a_slurm_job(job: str, tmp_path: Path) -> None:
    environment = slurm(tmp_path / "bin") | {"MODEL": "m", "VIT": "v", "DATA": "d", "OUT": "o", "DRY_RUN": 1, "GPUS": 8}
    printed = run_script(f"slurm/internvl_{job}.sbatch", "--seed", 7, **environment)
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 0" in printed
    assert f"--config {ROOT}/configs/internvl/{job}.yaml " in printed
    assert printed.endswith(" --resume auto --dataloader_num_workers 8 --seed 7 \n")


@pytest.mark.parametrize(
    ("code", "failures", "requeued"),
    [(0, 0, 0), (1, 0, 1), (1, 3, 0), (2, 0, 0), (137, 2, 1)],
    ids=["finished", "a lost node", "too often", "wrong input", "a killed task"],
)
def test_a_slurm_job_is_requeued_after_a_failure(code: int, failures: int, requeued: int, tmp_path: Path) -> None:
    # Requeues before a time limit do not count.
    environment = slurm(tmp_path / "bin") | {"SLURM_RESTART_COUNT": 9, "OUT": tmp_path / "out"}
    if failures:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/slurm-7.failures").write_text("exit code 1\n" * failures)
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\nexit {code}\n")
    job = ["bash", "scripts/slurm/train_stage3.sbatch"]
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    assert subprocess.run(job, cwd=ROOT, env=variables, capture_output=True, check=False).returncode == code
    assert requeues(tmp_path / "bin") == requeued


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_saves_is_requeued_and_finishes(tmp_path: Path) -> None:
    """Stubs start both nodes on this machine; scripts and torchrun are real."""
    environment = slurm(tmp_path / "bin") | {"GLOBAL_BATCH": 4, "MICRO_BATCH": 2, "SLURM_RESTART_COUNT": 9}
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "GPUS": "0"}
    rows, out = write_rows(tmp_path / "rows.json"), tmp_path / "out"
    few = {"image_size": 56, "learning_rate": 1e-3, "dataloader_num_workers": 0, "save_steps": 1000}
    flags = script_flags(CHECKPOINT, rows, out, **few, max_steps=400)
    job = subprocess.Popen(
        ["bash", "scripts/slurm/train_stage3.sbatch", *flags],
        cwd=ROOT,
        env=variables | {"MASTER_PORT": str(free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None and not losses(read_log(out / "log.jsonl")):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)  # as Slurm does, to the batch shell alone
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGUSR1, printed
    (checkpoint,) = finished_checkpoints(out)
    step = int(checkpoint.name.partition("-")[2])
    assert f"stopped by SIGUSR1 at step {step}; add --resume auto, which continues from checkpoint-{step}" in printed
    assert requeues(tmp_path / "bin") == 1

    flags = script_flags(CHECKPOINT, rows, out, **few, max_steps=step + 2)
    run_script("slurm/train_stage3.sbatch", *flags, **environment, MASTER_PORT=free_port())
    steps = [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, step + 3))
    load_model(out, device="cpu")


def test_a_hostfile_without_hosts_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# none\n")
    environment = os.environ | {"HOSTFILE": str(tmp_path / "hosts"), "DRY_RUN": "1"}
    command = [ROOT / "scripts/finetune.sh", "--output_dir", "x"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, f"error: HOSTFILE={tmp_path}/hosts names no host\n")


@pytest.mark.slow
@needs_compiler
def test_a_hostfile_starts_the_deepspeed_launcher(tmp_path: Path) -> None:
    """A stub of ssh answers the launcher's check of its hosts."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "ssh").write_text("#!/bin/bash\necho localhost\n")
    (stubs / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("# one node\nlocalhost slots=2\n")
    rows, out = write_rows(tmp_path / "rows.json"), tmp_path / "out"
    printed = run_script(
        "train_stage3.sh",
        *script_flags(CHECKPOINT, rows, out, image_size=56, num_train_epochs=1, learning_rate=1e-3),
        HOSTFILE=tmp_path / "hosts",
        PROCESSES=2,
        GLOBAL_BATCH=4,
        MICRO_BATCH=2,
        MASTER_PORT=free_port(),
        DEEPSPEED="scripts/zero2.json",
        PATH=f"{stubs}:{os.environ['PATH']}",
    )
    assert "deepspeed.launcher.runner" in printed
    assert len(losses(read_log(out / "log.jsonl"))) == 2
