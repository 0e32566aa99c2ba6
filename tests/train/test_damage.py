"""Damaged checkpoints: refused by name, with the way to resume from the one before."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import losses, train, write_rows

from yivl.checkpoint.manifest import MANIFEST, share_files
from yivl.errors import CheckpointError
from yivl.train.damage import check_files
from yivl.train.run_log import read_log

FILES = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"),
    *("training_arguments.json", "training_run.json"),
)
LORA: dict[str, Any] = {"lora_enable": True, "lora_dropout": 0.2, "max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with ``rows.json`` and ``out``, which holds two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    train(folder / "out", write_rows(folder / "rows.json"), **LORA)
    return folder


@pytest.fixture
def out(run: Path, tmp_path: Path) -> Path:
    """Return a copy of its output folder."""
    return Path(shutil.copytree(run / "out", tmp_path / "out"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "is missing"), (cut, r"has [\d,]+ bytes instead of [\d,]+"), (flip, "is damaged")],
)
@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_is_named(name: str, damage: Callable[[Path], None], reason: str, out: Path) -> None:
    damage(out / "checkpoint-4" / name)
    with pytest.raises(CheckpointError, match=f"checkpoint-4 is damaged: {re.escape(name)} {reason}; move it away"):
        check_files(out / "checkpoint-4")
    check_files(out / "checkpoint-2")


def test_the_advice_continues_from_the_checkpoint_before(run: Path, out: Path) -> None:
    rows, changes = run / "rows.json", LORA | {"resume": "auto"}
    (out / "checkpoint-4/rng_state.pth").unlink()
    (out / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="is damaged") as refused:
        train(out, rows, **changes)
    match = re.search(r"\(mv (\S+) (\S+)\) and give --resume (\S+)$", str(refused.value))
    assert match is not None
    source, target, before = (Path(*shlex.split(text)) for text in match.groups())
    source.rename(target)
    log = train(out, rows, **changes | {"resume": before})
    assert losses(log) == losses(read_log(run / "out/log.jsonl"))


def test_without_a_checkpoint_before_the_advice_is_a_new_start(out: Path) -> None:
    (out / "checkpoint-2/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint before it: move it away .* without --resume$"):
        check_files(out / "checkpoint-2")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (Path.unlink, cut)] + [("optimizer.pt", flip)],
)
def test_checkpoints_of_earlier_versions_are_checked_without_a_manifest(
    name: str, damage: Callable[[Path], None], out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = out / "checkpoint-4"
    (newest / MANIFEST).unlink()
    check_files(newest)
    assert caplog.messages == [f"{newest}: an earlier version wrote no {MANIFEST}; hashes are not checked"]
    damage(newest / name)
    with pytest.raises(CheckpointError, match=re.escape(name) if name in FILES[:4] else str(newest)):
        check_files(newest)


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": []}', '{"files": {"a": {"size": "1", "sha256": 2}}}', '{"files": {"a": 1}}']
)
def test_a_damaged_manifest_is_named(manifest: str, out: Path) -> None:
    (out / "checkpoint-4" / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4/{MANIFEST}"):
        check_files(out / "checkpoint-4")


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b", "\ud800"], ids=["long", "null", "surrogate"])
def test_a_manifest_may_name_what_no_file_can_be_called(name: str, out: Path) -> None:
    (out / "checkpoint-4" / MANIFEST).write_text(json.dumps({"files": {name: {"size": 1, "sha256": "a"}}}))
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: .* is missing"):
        check_files(out / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "field"),
    [("training_arguments.json", "world_size"), ("training_arguments.json", "optim"), ("training_run.json", "sources")],
)
def test_records_without_their_fields_are_refused(name: str, field: str, run: Path, out: Path) -> None:
    (out / "checkpoint-4" / MANIFEST).unlink()
    path = out / "checkpoint-4" / name
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    (out / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{field}.* the checkpoint is damaged"):
        train(out, run / "rows.json", **LORA | {"resume": "auto"})


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("training_arguments.json", {"world_size": 2**63}, "world_size is 9223372036854775808; expected an integer"),
        ("training_arguments.json", {"optim": 3}, "optim is 3; expected text"),
        ("training_arguments.json", {"gradient_accumulation_steps": "2"}, "gradient_accumulation_steps is '2'"),
        ("training_run.json", {"sources": [{"rows": "many"}]}, "sources: rows is 'many'; expected an integer"),
        ("trainer_state.json", {"global_step": "x"}, "global_step is 'x'; expected an integer"),
        ("trainer_state.json", {"log_history": 7}, "log_history is 7; expected a list"),
    ],
)
def test_records_with_wrong_fields_are_refused(name: str, fields: dict[str, Any], said: str, out: Path) -> None:
    (out / "checkpoint-4" / MANIFEST).unlink()
    path = out / "checkpoint-4" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=f"checkpoint-4/{re.escape(name)}: {said}"):
        check_files(out / "checkpoint-4")


def test_a_resumed_run_on_another_number_of_ranks_is_reproducible(run: Path, out: Path) -> None:
    # As two ranks write it.
    folder = out / "checkpoint-2"
    fields = json.loads((folder / "training_arguments.json").read_text())
    fields |= {"world_size": 2, "per_device_train_batch_size": 1}
    (folder / "training_arguments.json").write_text(json.dumps(fields))
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    (folder / MANIFEST).unlink()
    logs = []
    for number in range(2):
        torch.rand(number + 1)
        logs.append(losses(train(out.parent / str(number), run / "rows.json", **LORA | {"resume": folder})))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    assert logs[0] != losses(train(out.parent / "same", run / "rows.json", **LORA | {"resume": out / "checkpoint-4"}))


def test_each_rank_hashes_what_it_wrote_and_the_rest_by_size() -> None:
    states = {f"global_step2/zero_pp_rank_{number}_mp_rank_00_optim_states.pt": 5 for number in range(3)}
    sizes = states | {"model-1.safetensors": 4, "model-2.safetensors": 3, "config.json": 1, "vit/config.json": 1}
    assert share_files(sizes, 2) == [
        [*list(states)[::2], "config.json", "vit/config.json"],
        [list(states)[1], "model-1.safetensors", "model-2.safetensors"],
    ]
    assert share_files({"a": 1}, 3) == [["a"], [], []]
