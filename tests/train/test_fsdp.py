"""FSDP2: its flags, the memory it is estimated to need, and runs of two ranks against runs of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, ROOT
from support.golden_internvl import CHECKPOINT as INTERNVL
from support.serving import free_port
from support.training import flags, losses, train, weights, write_rows

from yivl.checkpoint.loading import load_model, read_small_files
from yivl.errors import CheckpointError, YiVLError
from yivl.train.arguments import parse_arguments
from yivl.train.memory import estimate_memory
from yivl.train.parameters import PartSize
from yivl.train.plan import RunPlan, Zero
from yivl.train.run_log import read_log


def plan(*given: str, world_size: int = 2) -> RunPlan:
    required = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    return RunPlan.of(parse_arguments([*required, *given]), world_size=world_size)


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        ([], 3),
        (["--fsdp_config", '{"fsdp_version": 2, "reshard_after_forward": true}'], 3),
        (["--fsdp_config", '{"fsdp_reshard_after_forward": false}'], 2),
    ],
)
def test_the_settings_of_fsdp_are_those_of_a_zero_stage(given: list[str], stage: int) -> None:
    assert plan("--fsdp", "True", *given).zero == Zero(stage, is_fsdp=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--fsdp", "True", "--deepspeed", "scripts/zero2.json"],
            "--fsdp True, --deepspeed scripts/zero2.json: drop one",
        ),
        (["--fsdp", "True", "--fp16", "True"], "--fp16 True: not supported with --fsdp True; use --bf16 True"),
        (["--fsdp", "True", "--fsdp_config", '{"version": 1}'], "only version 2 is supported"),
        (["--fsdp", "True", "--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}'], "state_dict_type: not supp"),
        (["--fsdp", "True", "--fsdp_config", '{"reshard_after_forward": 1}'], "reshard_after_forward: not supported"),
        (["--fsdp", "True", "--fsdp_config", "nowhere.json"], "--fsdp_config nowhere.json: cannot be read"),
        (["--fsdp_config", "{}"], "--fsdp_config has no effect without --fsdp True"),
        (
            ["--fsdp", "True", "--lora_enable", "True", "--bits", "4"],
            "--bits 4: FSDP2 cannot partition quantized weights",
        ),
        (["--fsdp", "full_shard auto_wrap"], "--fsdp: invalid value 'full_shard auto_wrap': expected True or False"),
    ],
)
def test_settings_that_fsdp_does_not_have_are_one_line(given: list[str], message: str) -> None:
    with pytest.raises(YiVLError, match=re.escape(message)) as error:
        plan(*given)
    assert "\n" not in str(error.value)


def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(YiVLError, match="--fsdp True: one process has nothing to shard"):
        plan("--fsdp", "True", world_size=1)
    assert plan("--fsdp", "True", "--dry_run", world_size=1).zero.is_fsdp


def test_the_states_are_divided_among_the_ranks() -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    sizes = [PartSize("language_model", 1_000_000, 1_000_000, 1e-5)]
    given = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--fsdp", "True", "--bf16", "True"]
    arguments = parse_arguments(given)
    one, eight = (estimate_memory(sizes, config, arguments, Zero(3, is_fsdp=True), num_gpus) for num_gpus in (1, 8))
    assert (eight.gradients, eight.optimizer) == (4_000_000 / 8, 8_000_000 / 8)
    # FP32 master weights are sharded; what is gathered, in bfloat16, does not depend on the number of ranks.
    assert one.weights - eight.weights == 4_000_000 * 7 / 8
    kept = estimate_memory(sizes, config, arguments, Zero(2, is_fsdp=True), 8)
    assert kept.weights > 4_000_000 / 8 + 2 * 1_000_000  # all layers at once


# Several runs of the same two ranks: starting Python takes longer than a run. Chunks of four tokens: batches of the
# ranks differ in the number of chunks of the loss, as they do in whether they have an image.
WORKER = """
import json, sys
from yivl.model import loss
from yivl.train.__main__ import main
loss.CHUNK_SIZE = 4
for given in json.loads(sys.argv[1]):
    main(given)
"""
# Adam normalizes gradients near zero, and so their rounding errors; a large epsilon avoids that.
COMMON: dict[str, Any] = {"adam_epsilon": 1e-2, "eval_strategy": "epoch"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "stage 1": {
        "unfreeze_mm_vision_tower": True,
        "freeze_backbone": True,
        "gradient_checkpointing": True,
        "vision_gradient_checkpointing": True,
    },
    "internvl": {
        "model_name_or_path": INTERNVL,
        "unfreeze_mm_vision_tower": True,
        "gradient_checkpointing": True,
        "vision_gradient_checkpointing": True,
    },
    "adapters": {"lora_enable": True, "freeze_mm_mlp_adapter": True, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, and of one process, over samples with and without images."""
    folder = tmp_path_factory.mktemp("fsdp")
    rows = write_rows(folder / "rows.json")
    jobs = []
    for name, kind in KINDS.items():
        common = COMMON | {"eval_data_path": rows} | kind
        train(folder / name / "one", rows, **common | {"per_device_train_batch_size": 2})
        sharded = common | {"per_device_train_batch_size": 1, "fsdp": True}
        jobs.append(flags(folder / name / "two", rows, **sharded))
        jobs.append(flags(folder / name / "resumed", rows, **sharded, resume=folder / name / "two/checkpoint-3"))
    jobs.append(flags(folder / "bf16", rows, per_device_train_batch_size=1, fsdp=True, bf16=True, max_steps=1))
    (folder / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    result = subprocess.run(
        [*command, str(folder / "worker.py"), json.dumps(jobs)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[:4000]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_match_one_and_resume_bit_exactly(name: str, runs: Path) -> None:
    folder = runs / name
    one, two, resumed = (read_log(folder / run / "log.jsonl") for run in ("one", "two", "resumed"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for key in ("grad_norm", "eval_loss"):
        first, second = ([line[key] for line in log if key in line] for log in (one, two))
        assert second == pytest.approx(first, rel=1e-4)
        assert first
    # The published format, with all weights.
    expected, found, after = (weights(folder / run) for run in ("one", "two", "resumed"))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
        assert torch.equal(value, after[key])
    assert losses(resumed) == losses(two)[-len(losses(resumed)) :]
    assert 0 < len(losses(resumed)) < len(losses(two))
    load_model(folder / "two", device="cpu")
    assert not list(folder.glob("two/checkpoint-*/pytorch_model*"))


@pytest.mark.slow
def test_bf16_runs_keep_master_weights_and_write_a_model_in_bfloat16(runs: Path) -> None:
    assert {value.dtype for value in weights(runs / "bf16").values()} == {torch.bfloat16}
    checkpoint = weights(runs / "bf16/checkpoint-1")
    assert checkpoint["lm_head.weight"].dtype == torch.float32
    loss = losses(read_log(runs / "bf16/log.jsonl"))[0]
    assert torch.tensor(loss).bfloat16().item() != loss  # not rounded to bfloat16


@pytest.mark.slow
def test_a_checkpoint_of_fsdp_is_not_resumed_without_it(runs: Path, tmp_path: Path) -> None:
    kind = COMMON | {"eval_data_path": runs / "rows.json"} | KINDS["adapters"]
    with pytest.raises(CheckpointError, match="holds no optimizer state to resume without DeepSpeed and FSDP2"):
        train(tmp_path, runs / "rows.json", **kind, resume=runs / "adapters/two/checkpoint-3")
