"""Runs on several nodes: what all ranks must share, a node that is lost, and restarts."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from support.golden import ROOT
from support.serving import free_port
from support.training import flags, losses, run_script, train, write_rows
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerState

from yivl.checkpoint.format import read_json
from yivl.errors import CheckpointError, YiVLError
from yivl.train import heartbeat, launch
from yivl.train.arguments import parse_arguments
from yivl.train.dataloaders import set_up_worker
from yivl.train.flags import torchrun_parser
from yivl.train.nodes import reporting_lost_connections
from yivl.train.plan import prepare_environment
from yivl.train.resume import check_same_run
from yivl.train.run_log import RunLog
from yivl.train.stopping import StopOnSignal

# The ranks of one node take the folders and the data of two nodes. What each check raises, or "passed", is written. A
# check that fails leaves the process group, so that each one has its own.
WORKER = """
import os, sys
import torch.distributed as dist
from yivl.train import nodes
from yivl.train.ranks import leave_group

for name in ("out", "out0", "out1"):
    os.makedirs(f"{sys.argv[1]}/{name}", exist_ok=True)
rank, base = int(os.environ["RANK"]), sys.argv[1]
nodes._VISIBLE_SECONDS = 0.5
facts = [{"source": f"/node{rank}/rows.json", "rows": 7}]
checks = {
    "shared": lambda: nodes.check_output_dir(f"{base}/out"),
    "unshared": lambda: nodes.check_output_dir(f"{base}/out{rank}"),
    "unwritable": lambda: nodes.check_output_dir(f"{base}/file"),
    "same": lambda: nodes.check_data("rows.json", facts),
    "fewer rows": lambda: nodes.check_data("rows.json", [facts[0] | {"rows": 7 + rank}]),
    "no fingerprint": lambda: nodes.check_data("rows.json", [facts[0] | ({"fingerprint": "ab"} if rank else {})]),
    "fewer sources": lambda: nodes.check_data("rows.json", facts * (rank + 1)),
}
with open(f"{base}/rank{rank}", "w") as file:
    for name, check in checks.items():
        dist.init_process_group("gloo", init_method=f"file://{base}/{name}.store", rank=rank, world_size=2)
        try:
            check()
            print(f"{name}: passed", file=file)
        except (ValueError, OSError, SystemExit) as error:
            print(f"{name}: {type(error).__name__}: {getattr(error, 'strerror', error)}", file=file)
        leave_group()
"""


def test_ranks_check_that_they_share_folder_and_data(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, str(tmp_path / "worker.py"), str(tmp_path)], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    host = socket.gethostname()
    assert (tmp_path / "rank0").read_text().splitlines() == [
        "shared: passed",
        f"unshared: YiVLError: --output_dir {tmp_path}/out0: not shared: {host} cannot see what rank 0 writes on "
        f"{host}; give a folder on a shared file system, or --save_strategy no, with which rank 0 alone writes",
        "unwritable: NotADirectoryError: Not a directory",
        "same: passed",
        f"fewer rows: YiVLError: --data_path rows.json: rows of /node0/rows.json is 7 on {host} (rank 0) and 8 on "
        f"{host} (rank 1); give all nodes the same data",
        f"no fingerprint: YiVLError: --data_path rows.json: fingerprint of /node0/rows.json is None on {host} "
        f"(rank 0) and ab on {host} (rank 1); give all nodes the same data",
        f"fewer sources: YiVLError: --data_path rows.json: 1 sources on {host} and 2 on {host} (rank 1); give all "
        "nodes the same data",
    ]
    # The other ranks of a node end without a line of their own.
    assert (tmp_path / "rank1").read_text().splitlines() == [
        "shared: passed",
        "unshared: SystemExit: 2",
        "unwritable: SystemExit: 1",
        "same: passed",
        *(f"{name}: SystemExit: 2" for name in ("fewer rows", "no fingerprint", "fewer sources")),
    ]
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "out0").iterdir()) == []


# Rank 0 ends at once. At a barrier, the other rank would lose its connection.
REFUSAL = """
import torch.distributed as dist
from yivl import command_line
from yivl.errors import YiVLError
from yivl.train import __main__ as program, ranks

def refuse():
    raise YiVLError("out: another run writes to it")

def main():
    dist.init_process_group("gloo")
    ranks.on_rank_0(refuse)

program.main = main
command_line.run(program._run)
"""


def test_a_refusal_of_rank_0_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(REFUSAL)
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: out: another run writes to it\n")


@pytest.mark.parametrize(
    ("nodes", "changes", "reason"),
    [
        (["--nnodes", "3:4"], {}, "add --resume auto"),
        (["--nnodes", "2", "--max-restarts", "1"], {}, "add --resume auto"),
        (["--nnodes", "3:4"], {"resume": "auto"}, "--nnodes 3:4: add --global_batch_size"),
        (["--nnodes", "2:3"], {"resume": "auto", "global_batch_size": 4}, "--global_batch_size 4 is no multiple of 3"),
        (
            ["--nnodes", "3:4"],
            {"resume": "auto", "global_batch_size": 12, "deepspeed": ROOT / "scripts/zero2.json"},
            "DeepSpeed cannot load the optimizer states of another number of ranks",
        ),
    ],
)
def test_flags_of_restarts_are_checked_before_ranks_start(
    nodes: list[str], changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    training = flags(tmp_path, tmp_path / "rows.json", per_device_train_batch_size=1, **changes)
    given = torchrun_parser("launch").parse_args([*nodes, "--nproc-per-node", "1", "-m", "yivl.train", *training])
    with pytest.raises(YiVLError, match=reason):
        launch._check_flags(given)


def test_the_script_starts_an_elastic_rendezvous() -> None:
    variables = {"DRY_RUN": 1, "NNODES": "3:4", "MAX_RESTARTS": 2, "MASTER_ADDR": "node0", "MASTER_PORT": 29512}
    printed = run_script("finetune.sh", **variables, NODE_RANK=1)
    assert "--rdzv-backend c10d --rdzv-endpoint node0:29512 --rdzv-id yivl --rdzv-conf is_host=0" in printed
    assert "--nnodes 3:4" in printed
    assert "--max-restarts 2" in printed
    assert "--rdzv-conf is_host=1" in run_script("finetune.sh", **variables, NODE_RANK=0)


# Fails in the first attempt; exit code 3 if its store outlives it.
RESTARTED = """
import os, sys
from torch.distributed import rendezvous

store, _, _ = next(rendezvous("env://"))
if store.add("attempts", 1) != 1:
    sys.exit(3)
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


def test_restarted_ranks_do_not_read_the_addresses_of_ended_ones(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(RESTARTED)
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--max-restarts", "1"]
    result = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("text", ["0", "soon"])
def test_a_wrong_node_timeout_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_TIMEOUT", text)
    given = torchrun_parser("launch").parse_args(["--nnodes", "2", "-m", "yivl.eval"])
    with pytest.raises(YiVLError, match=f"NODE_TIMEOUT={text}: expected a positive number"):
        launch._heartbeat(given)
    assert launch._heartbeat(torchrun_parser("launch").parse_args(["--standalone", "-m", "yivl.eval"])) is None


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))


@pytest.fixture
def rank() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


class _Pids(Dataset[int]):
    """The process that reads a sample."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> int:
        return os.getpid()


class Peer:
    """The launcher of another node, as its heartbeats look."""

    def __init__(self, store: dist.TCPStore) -> None:
        self.store, self.number = store, store.add("yivl/nodes", 1)
        store.set(f"yivl/name/{self.number}", "node7")

    def beat(self, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            self.store.add(f"yivl/beats/{self.number}", 1)
            time.sleep(0.1)


def test_the_ranks_that_wait_for_a_silent_node_are_ended(
    server: dist.TCPStore, rank: "subprocess.Popen[bytes]", capfd: pytest.CaptureFixture[str]
) -> None:
    peer = Peer(server)
    with heartbeat.Heartbeat("127.0.0.1", server.port, timeout=1.0) as beating:
        peer.beat(2)
        assert (beating.lost, rank.poll()) == (None, None)
        assert rank.wait(timeout=30) == -9
    line = "error: node node7 has not answered for 1 s; its machine or network failed; resume with --resume auto"
    assert (capfd.readouterr().err, beating.lost) == (f"{line}\n", line)


def test_a_node_that_ended_is_not_lost(server: dist.TCPStore, rank: "subprocess.Popen[bytes]") -> None:
    peer = Peer(server)
    with heartbeat.Heartbeat("127.0.0.1", server.port, timeout=1.0) as beating:
        peer.beat(1)
        server.add(f"yivl/ended/{peer.number}", 1)
        time.sleep(3)
        assert (beating.lost, rank.poll()) == (None, None)
    assert server.add("yivl/ended/2", 0) == 1  # the other nodes do not miss this one


def test_ranks_that_were_restarted_without_a_silent_node_go_on(server: dist.TCPStore) -> None:
    peer = Peer(server)
    with heartbeat.Heartbeat("127.0.0.1", server.port, timeout=2.0) as beating:
        peer.beat(1.5)
        time.sleep(1.2)
        restarted = subprocess.Popen(["sleep", "60"], start_new_session=True)
        time.sleep(3)
        assert (beating.lost, restarted.poll()) == (None, None)
        restarted.kill()
        restarted.wait()


RANKS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}


def _set_ranks(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    for name, value in (RANKS | changes).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use_is_named_by_the_launcher(port_in_use: int) -> None:
    command = [sys.executable, "-m", "yivl.train.launch", "--nnodes", "2", "--master-port", str(port_in_use)]
    result = subprocess.run([*command, "-m", "yivl.eval"], capture_output=True, text=True, check=False)
    line = (
        f"error: port {port_in_use} is in use on {socket.gethostname()}; set MASTER_PORT to another one on all nodes\n"
    )
    assert (result.returncode, result.stderr) == (1, line)


def test_a_port_in_use_is_named_by_rank_0(port_in_use: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_ranks(monkeypatch, MASTER_PORT=port_in_use)
    with pytest.raises(YiVLError, match=f"port {port_in_use} is in use on"), reporting_lost_connections():
        next(dist.rendezvous("env://"))


def test_a_run_of_one_process_takes_no_port_of_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_ranks(monkeypatch)  # so that what is set below is undone
    for name in RANKS:
        monkeypatch.delenv(name)
    prepare_environment(
        parse_arguments(flags(Path("out"), "rows.json", deepspeed=ROOT / "scripts/zero2.json")).training
    )
    # Another program listens on the port before this one does, as it may in the seconds that imports take.
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        store, rank, world_size = next(dist.rendezvous("env://"))
    assert (store.add("key", 3), rank, world_size) == (3, 0, 1)


def test_deepspeed_finds_the_ninja_of_an_environment_that_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ninja")
    _set_ranks(monkeypatch)
    training = parse_arguments(flags(Path("out"), "rows.json", deepspeed=ROOT / "scripts/zero2.json")).training
    environment = sysconfig.get_path("scripts")
    for path in ("/usr/bin", f"/usr/bin:{environment}"):
        monkeypatch.setenv("PATH", path)
        prepare_environment(training)
        prepare_environment(training)  # as in a second run of the process
        assert os.environ["PATH"] == f"{environment}:{path}"
        assert shutil.which("ninja") == f"{environment}/ninja"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), reporting_lost_connections():
        raise RuntimeError("a bug")


def test_sigterm_before_the_ranks_start_ends_the_launcher() -> None:
    code = (
        "import signal\nfrom yivl.train import launch\nlaunch._forward_sigterm()\nsignal.raise_signal(signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 128 + signal.SIGTERM


def test_of_several_ranks_sigterm_ends_each() -> None:
    # The launcher of DeepSpeed sets RANK, WORLD_SIZE and LOCAL_SIZE alone.
    stop, before = StopOnSignal(), signal.getsignal(signal.SIGTERM)
    for size, is_handled in ((2, False), (1, True)):
        args: Any = SimpleNamespace(save_strategy="steps", world_size=size)
        stop.on_train_begin(args, TrainerState())
        assert (signal.getsignal(signal.SIGTERM) != before) == is_handled
        assert signal.getsignal(signal.SIGUSR1) == stop._receive
        stop.on_train_end()


def test_a_signal_to_all_processes_does_not_end_workers() -> None:
    loader: Any = DataLoader(_Pids(), num_workers=1, worker_init_fn=set_up_worker)  # before the rank handles it
    workers = iter(loader)
    pid = int(next(workers))
    os.kill(pid, signal.SIGUSR1)
    assert [int(other) for other in workers] == [pid] * 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_current_step_and_stops(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write_rows(tmp_path / "rows.json")
    whole = losses(train(tmp_path / "whole", rows))
    step_end = RunLog.on_step_end

    def on_step_end(log: RunLog, args: Any, state: Any, *others: Any, **named: Any) -> None:
        step_end(log, args, state, *others, **named)
        if state.global_step == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(RunLog, "on_step_end", on_step_end)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        train(tmp_path / "out", rows)
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    assert f"stopped by {number.name} at step 2; add --resume auto, which continues from checkpoint-2" in caplog.text
    assert signal.getsignal(number) == before
    assert not (tmp_path / "out/config.json").exists()  # the final model
    assert losses(train(tmp_path / "out", rows, resume="auto")) == whole


def test_a_deepspeed_checkpoint_of_other_ranks_is_refused(tmp_path: Path) -> None:
    train(tmp_path, write_rows(tmp_path / "rows.json"), max_steps=2, save_steps=1)
    recorded = read_json(tmp_path / "checkpoint-1/training_arguments.json")
    now = recorded | {"deepspeed": "scripts/zero2.json", "world_size": 2, "per_device_train_batch_size": 1}
    with pytest.raises(CheckpointError, match="DeepSpeed saved optimizer states of 1 processes, which 2 cannot load"):
        check_same_run(tmp_path / "checkpoint-1", now, 2)


def test_a_run_from_before_the_flags_of_a_new_model_followed_its_vit_goes_on(tmp_path: Path) -> None:
    train(tmp_path, write_rows(tmp_path / "rows.json"), max_steps=2, save_steps=1)
    path = tmp_path / "checkpoint-1/training_arguments.json"
    now = read_json(path)
    former = {"mm_projector_type": "mlp2x_gelu_Norm", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    assert [now[name] for name in former] == [None] * 3
    for name in ("ps_version", "drop_path_rate"):  # did not exist
        del now[name]
    path.write_text(json.dumps(now | former))
    check_same_run(tmp_path / "checkpoint-1", now, 2)
    path.write_text(json.dumps(now | former | {"mm_vision_select_feature": "cls_patch"}))
    with pytest.raises(CheckpointError, match="mm_vision_select_feature was cls_patch when checkpoint-1 was written"):
        check_same_run(tmp_path / "checkpoint-1", now, 2)


@pytest.fixture(scope="module")
def rehearsal() -> ModuleType:
    """The script, where network namespaces are available."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import network_namespaces
        import rehearse_nodes
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    if reason := network_namespaces.unavailable():
        pytest.skip(reason)
    return rehearse_nodes


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["killed", "unplugged"])
def test_a_run_continues_after_a_node_was_lost(scenario: str, rehearsal: ModuleType, tmp_path: Path) -> None:
    """Losses of two nodes, before and after, are those of two processes on one node."""
    table = rehearsal.Table()
    with rehearsal.Network(2) as network:
        rehearsal.rehearse_failure(rehearsal.Rehearsal(network, tmp_path, num_steps=9), table, scenario)
    assert table.failed == 0


@pytest.mark.slow
def test_an_output_folder_of_one_node_is_refused(rehearsal: ModuleType, tmp_path: Path) -> None:
    table = rehearsal.Table()
    with rehearsal.Network(2) as network:
        rehearsal.rehearse_unshared(rehearsal.Rehearsal(network, tmp_path), table)
    assert table.failed == 0
