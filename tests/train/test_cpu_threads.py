"""CPU threads of training: idle ones sleep, and the processes of a node share the cores."""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.golden import ROOT
from support.training import flags, write_rows

from yivl.train import cpu_threads, launch
from yivl.train.__main__ import main
from yivl.train.arguments import parse_arguments
from yivl.train.compilation import describe_compilation
from yivl.train.plan import RunPlan, Zero
from yivl.train.run import prepare

OFFLOAD = ROOT / "scripts/zero2_offload.json"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_cores_are_divided_among_the_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert cpu_threads.share_cores(4) == 1
        assert os.environ.pop("OMP_NUM_THREADS") == "1"
        torch.set_num_threads(6)
        assert cpu_threads.share_cores(2) == torch.get_num_threads() == 3
        assert cpu_threads.share_cores(3) == 3  # given now, by the launcher or the user
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cpu_threads.local_world_size() == 3


@pytest.mark.parametrize(("given", "expected"), [({}, "sleep"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "spin")])
def test_a_run_says_its_threads_and_keeps_what_the_user_set(
    tmp_path: Path, given: dict[str, str], expected: str
) -> None:
    arguments = flags(tmp_path / "out", write_rows(tmp_path / "rows.json"), dry_run=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | given
    command = [sys.executable, "-m", "yivl.train", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"CPU threads: 1 x 1 processes; idle threads {expected} " in result.stderr


@pytest.mark.parametrize(
    ("native", "bf16", "dry_run", "warns"),
    [
        (False, True, False, True),
        (False, True, True, False),  # the run may be for a machine with GPUs
        (False, False, False, False),
        (True, True, False, False),
    ],
)
def test_bf16_on_a_cpu_that_emulates_it_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    native: bool,
    bf16: bool,
    dry_run: bool,
    warns: bool,
) -> None:
    monkeypatch.setattr("yivl.train.run.has_native_bfloat16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = write_rows(tmp_path / "rows.json")
    arguments = parse_arguments(flags(tmp_path / "out", data, dry_run=dry_run, bf16=bf16))
    with caplog.at_level("WARNING"), ExitStack() as resources:
        prepare(arguments, RunPlan.of(arguments), resources)
    assert ("give --bf16 False" in caplog.text) is warns


def test_the_launcher_divides_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch", "--standalone", "--nproc-per-node", "2", "-m", "yivl.eval"])
    monkeypatch.setattr("torch.distributed.run.main", lambda _: None)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # restored: the launcher disables logging
    launch.main()
    assert os.environ["OMP_NUM_THREADS"] == str(max(torch.get_num_threads() // 2, 1))


def test_a_dry_run_with_deepspeed_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    data = write_rows(tmp_path / "rows.json")
    with caplog.at_level("INFO"):
        main(flags(tmp_path / "out", data, dry_run=True, deepspeed=OFFLOAD))
    assert "ZeRO stage 2" in caplog.text  # the plan still counts it
    assert "DeepSpeed compiles" not in caplog.text
    assert not (tmp_path / "extensions").exists()
    assert not torch.distributed.is_initialized()


def test_deepspeeds_first_compilation_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    offload, plain = Zero(2, offloads_optimizer=True), Zero(2)
    text = describe_compilation(offload)
    assert text is not None
    assert text.startswith("DeepSpeed compiles deepspeed_shm_comm and cpu_adam, ")
    assert str(tmp_path) in text
    (tmp_path / "py311_cpu/deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "py311_cpu/deepspeed_shm_comm/deepspeed_shm_comm.so").touch()
    assert describe_compilation(plain) is None
    text = describe_compilation(offload)
    assert text is not None
    assert text.startswith("DeepSpeed compiles cpu_adam, ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert describe_compilation(plain) is None
