"""Runs of the trainer: the loss of a step, bit-exact resume, and the files of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from support.golden import CHECKPOINT
from support.golden_internvl import CHECKPOINT as INTERNVL
from support.training import FACTS, IMAGES, ROOT, conversation, flags, losses, train, weights, write_rows, write_shards

from yivl.checkpoint import atomic
from yivl.data.rows import RowError
from yivl.errors import CheckpointError, YiVLError
from yivl.train.__main__ import main
from yivl.train.resume import UNFINISHED, find_checkpoint, finished_checkpoints
from yivl.train.run_log import read_log

# Kinds of runs; each must resume bit-exactly.
RUNS: dict[str, dict[str, Any]] = {
    "full": {"unfreeze_mm_vision_tower": True},
    "lora": {"lora_enable": True, "lora_dropout": 0.1},
    "grouped, workers, accumulated": {
        "group_by_modality_length": True,
        "dataloader_num_workers": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "packed": {"packing": True},
    "evaluated": {"eval_data_path": "rows", "eval_strategy": "epoch", "lora_enable": True, "lora_dropout": 0.3},
    "internvl": {
        "model_name_or_path": INTERNVL,
        "unfreeze_mm_vision_tower": True,
        "drop_path_rate": 0.4,
        "bf16": True,
        "gradient_checkpointing": True,
        "vision_gradient_checkpointing": True,
    },
    "internvl, lora, packed": {
        "model_name_or_path": INTERNVL,
        "lora_enable": True,
        "lora_vision_tower": True,
        "lora_dropout": 0.1,
        "drop_path_rate": 0.4,
        "packing": True,
    },
    "stream": {"data_path": "shards", "max_steps": 8, "dataloader_num_workers": 2, "shuffle_buffer": 4},
}


def assert_same_folder(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def data_for(changes: dict[str, Any], folder: Path) -> Path | str:
    rows = write_rows(folder / "rows.json")
    if "eval_data_path" in changes:
        changes["eval_data_path"] = rows
    return write_shards(folder / "shards", 2, 7) if changes.pop("data_path", None) == "shards" else rows


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_exact(name: str, tmp_path: Path) -> None:
    changes = dict(RUNS[name])
    data = data_for(changes, tmp_path)
    if "eval_strategy" in changes:
        changes["save_steps"] = 2
    whole = train(tmp_path / "whole", data, **changes, save_total_limit=5)
    assert len(losses(whole)) == 8
    for step in (4, 6) if "eval_strategy" in changes else (3, 6):  # in an epoch, at its end, in the second
        resumed = tmp_path / f"from {step}"
        resumed.mkdir()
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", resumed / f"checkpoint-{step}")
        log = train(resumed, data, **changes, resume="auto")
        assert losses(log) == losses(whole)[step:]
        assert_same_folder(resumed, tmp_path / "whole")
        optimizers = [
            torch.load(folder / "checkpoint-8/optimizer.pt", weights_only=True)
            for folder in (resumed, tmp_path / "whole")
        ]
        torch.testing.assert_close(*(optimizer["state"] for optimizer in optimizers), atol=0, rtol=0)


def test_a_run_that_lacks_only_its_final_model_takes_no_step_more(tmp_path: Path) -> None:
    """The last step is in the middle of an epoch, where batches are left."""
    data = write_rows(tmp_path / "rows.json")
    train(tmp_path / "whole", data, max_steps=3, save_steps=3)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    assert losses(train(tmp_path / "resumed", data, max_steps=3, save_steps=3, resume="auto")) == []
    assert_same_folder(tmp_path / "resumed", tmp_path / "whole")


def test_a_run_over_tar_shards_resumes_with_another_number_of_workers_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_shards(tmp_path / "shards", 2, 7)
    stream: dict[str, Any] = {"save_steps": 2, "shuffle_buffer": 4}
    train(tmp_path / "whole", data, **stream, max_steps=2, dataloader_num_workers=2)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole/checkpoint-2", resumed / "checkpoint-2")
    others = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "resume": "auto"}
    assert len(losses(train(resumed, data, **stream, **others, max_steps=4))) == 2
    (position,) = json.loads((resumed / "checkpoint-4/data_position.json").read_text())["streams"]
    assert position["rows"] == 4  # of the ten that were left of the epoch
    assert "2 streams (ranks x --dataloader_num_workers), and this run has 1" in caplog.text
    (resumed / "checkpoint-4/data_position.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: data_position\.json is missing"):
        train(resumed, data, **stream, **others, max_steps=6)


def test_gradient_accumulation_does_not_change_a_step(tmp_path: Path) -> None:
    # Answers of different lengths: a mean of means would weigh them differently.
    rows = [conversation("photo_rgb.jpg" if i % 2 else None, f"q {i}", "word " * (1 + 5 * i)) for i in range(4)]
    data = write_rows(tmp_path / "rows.json", rows)
    common: dict[str, Any] = {"num_train_epochs": 4, "max_grad_norm": 0}
    logs = [
        train(
            tmp_path / str(size),
            data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **common,
        )
        for size in (1, 2, 4)
    ]
    for log in logs[1:]:
        for mine, other in zip(log, logs[0], strict=True):
            for key in ("loss", "grad_norm"):
                if key in mine:
                    assert mine[key] == pytest.approx(other[key], rel=2e-5)


def test_packing_and_grouping_do_not_change_the_loss_of_a_step(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    common: dict[str, Any] = {"per_device_train_batch_size": 8, "num_train_epochs": 3}
    plain, packed, grouped = (
        losses(train(tmp_path / name, data, **common, **changes))
        for name, changes in (("plain", {}), ("packed", {"packing": True}), ("grouped", {"group_by_length": True}))
    )
    assert packed == pytest.approx(plain, rel=1e-4)
    assert grouped == pytest.approx(plain, rel=1e-4)


def test_a_run_writes_a_model_a_log_a_loss_curve_and_its_flags(tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = train(out, write_rows(tmp_path / "rows.json"), save_total_limit=2, report_to="tensorboard")
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["rows_per_second"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    results = json.loads((out / "train_results.json").read_text())
    assert results["train_samples_per_second"] > 0
    assert [path.name for path in finished_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    assert not (out / UNFINISHED).exists()
    with Image.open(out / "loss.png") as image:
        assert image.size == (960, 540)
        assert len(image.convert("RGB").getcolors(100_000)) > 20  # not an empty frame
    saved = json.loads((out / "training_arguments.json").read_text())
    assert (saved["learning_rate"], saved["model_max_length"], saved["lora_enable"]) == (1e-3, 2048, False)
    assert list(out.glob("runs/*/events*"))
    # A complete checkpoint, with the tokenizer and the ViT.
    assert {"config.json", "tokenizer.model", "model.safetensors", "vit"} <= {path.name for path in out.iterdir()}


def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(tmp_path: Path) -> None:
    rows = [conversation("photo_rgb.jpg" if i % 2 else None, f"q {i}", "word " * (1 + 5 * i)) for i in range(5)]
    data = write_rows(tmp_path / "rows.json", rows)
    measured = []
    for size, packing, workers in ((1, False, 0), (2, False, 1), (5, False, 0), (3, True, 0)):
        log = train(
            tmp_path / f"{size}",
            data,
            eval_data_path=data,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
            learning_rate=0,
            per_device_train_batch_size=5,
            per_device_eval_batch_size=size,
            packing=packing,
            dataloader_num_workers=workers,
        )
        measured.append(next(line["eval_loss"] for line in log if "eval_loss" in line))
        assert measured[-1] == pytest.approx(losses(log)[0], rel=1e-5)  # the same samples, before the first update
    assert measured == pytest.approx([measured[0]] * 4, rel=1e-5)


def test_a_nan_loss_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match=r"step \d: the loss is (nan|inf); resume from an earlier checkpoint"):
        train(tmp_path / "out", write_rows(tmp_path / "rows.json"), learning_rate=1e30, warmup_ratio=0, max_grad_norm=0)
    assert not (tmp_path / "out/config.json").exists()


def test_a_run_is_resumed_with_the_flags_that_decide_its_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_rows(tmp_path / "rows.json")
    out = tmp_path / "out"
    train(out, data, max_steps=6)
    for changes, message in (
        ({"per_device_train_batch_size": 1}, "global batch size was 2 when checkpoint-6 was written, and is 1 now"),
        ({"seed": 7}, "seed was 42"),
        ({"group_by_length": True}, "group_by_length was False"),
        ({"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower was False"),
        ({"lora_enable": True}, "lora_enable was False"),
        ({"max_steps": 4}, r"is of step 6, after the last step of this run \(4\)"),
        ({"optim": "sgd"}, "optim was adamw_torch when"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_data_path": data},
            "lr_scheduler_type was cosine",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(out, data, **{"max_steps": 8, "resume": "auto"} | changes)
    with pytest.raises(CheckpointError, match="checkpoint-6 is later than checkpoint-3"):
        train(out, data, max_steps=8, resume=out / "checkpoint-3")
    train(tmp_path / "other", data, max_steps=1)
    with pytest.raises(CheckpointError, match="holds checkpoint-1 of a run"):
        train(tmp_path / "other", data, max_steps=8, resume=out / "checkpoint-6")
    # Two micro-batches of one sample are the step of one of two.
    with caplog.at_level("WARNING"):
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 5e-4}
        train(out, data, **changes, max_steps=8, resume="auto")
    assert "learning_rate was 0.001 when checkpoint-6 was written, and is 0.0005 now" in caplog.messages
    train(tmp_path / "new", data, max_steps=8, resume=out / "checkpoint-6")  # a new folder branches off
    (tmp_path / "new/checkpoint-8/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-8 is damaged: optimizer\.pt is missing; there is no"):
        train(tmp_path / "new", data, max_steps=9, resume="auto")


def test_a_resumed_run_applies_the_learning_rates_and_the_weight_decay_of_its_flags(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    out = tmp_path / "out"
    before: dict[str, Any] = {"mm_projector_lr": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.99}
    whole = train(out, data, **before, max_steps=8, save_total_limit=None)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(out / "checkpoint-3", resumed / "checkpoint-3")
    after: dict[str, Any] = {"learning_rate": 1e-4, "mm_projector_lr": 5e-3, "weight_decay": 0.2, "adam_beta2": 0.9}
    log = train(resumed, data, **after, max_steps=8, resume="auto")

    def rates(lines: list[dict[str, Any]]) -> list[float]:
        return [line["learning_rate"] for line in lines if "loss" in line]

    assert rates(log) == pytest.approx([rate / 10 for rate in rates(whole)[3:]])
    assert losses(log)[0] == losses(whole)[3]
    assert losses(log)[2:] != losses(whole)[5:]
    groups = torch.load(resumed / "checkpoint-8/optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-4, 5e-3}
    assert {group["weight_decay"] for group in groups} == {0.2, 0.0}
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_an_output_folder_with_a_run_or_a_model_is_not_overwritten(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", data, max_steps=3)
    with pytest.raises(CheckpointError, match=r"holds checkpoint-3 of a run; add --resume auto"):
        train(tmp_path / "out", data)
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    for resume in (None, "auto"):
        with pytest.raises(CheckpointError, match="holds a model; give another --output_dir"):
            train(tmp_path / "out", data, resume=resume)
    assert find_checkpoint(tmp_path / "new", "auto") is None


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", data, max_steps=3)

    def files() -> dict[Path, tuple[int, int]]:
        paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    before = files()
    with caplog.at_level("INFO"):
        train(tmp_path / "out", data, max_steps=3, resume="auto")
    assert f"this run is finished (3 of 3 steps); the model is in {tmp_path / 'out'}" in caplog.messages
    assert files() == before


@pytest.mark.parametrize("writes", range(6))
def test_an_interrupted_save_leaves_the_checkpoint_before(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.json")
    whole = train(tmp_path / "whole", data, max_steps=4, save_steps=2)
    # A crash before the n-th file of the second checkpoint, or just before it is moved.
    real_save, real_settle, remaining = torch.save, atomic.settle, writes

    class Crash(BaseException):
        pass

    def crash() -> None:
        nonlocal remaining
        if (tmp_path / "out/checkpoint-2").exists():
            if remaining == 0:
                raise Crash
            remaining -= 1

    def save(*args: Any, **kwargs: Any) -> None:
        crash()
        real_save(*args, **kwargs)

    def settle(folder: Path) -> None:
        crash()
        real_settle(folder)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(atomic, "settle", settle)
    monkeypatch.setattr("yivl.train.resume.settle", settle)
    try:
        train(tmp_path / "out", data, max_steps=4, save_steps=2)
    except Crash:
        pass
    else:
        assert writes >= 5  # optimizer, scheduler, RNG states, checkpoint, final model
    monkeypatch.undo()
    finished = [path.name for path in finished_checkpoints(tmp_path / "out")]
    assert finished == (["checkpoint-2"] if writes < 4 else ["checkpoint-2", "checkpoint-4"])
    log = train(tmp_path / "out", data, max_steps=4, save_steps=2, resume="auto")
    assert losses(log) == losses(whole)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_newest_checkpoint(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    whole = train(tmp_path / "whole", data, num_train_epochs=15, save_steps=2)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "yivl.train", *flags(out, data, num_train_epochs=15, save_steps=2)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 300
        while len(losses(read_log(out / "log.jsonl"))) < 7:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    reached = losses(read_log(out / "log.jsonl"))
    newest = finished_checkpoints(out)[-1]
    step = int(newest.name.split("-")[1])
    assert len(reached) - step <= 4  # at most the steps since, and one checkpoint that was being written
    assert not (out / "config.json").exists()
    log = train(out, data, num_train_epochs=15, save_steps=2, resume="auto")
    assert losses(log) == losses(whole)
    assert_same_folder(out, tmp_path / "whole")


def test_bad_rows_stop_a_run_or_are_reported_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = [conversation(None, f"q {index}", f"answer {index}") for index in range(6)]
    bad = [conversation(None, "q", "a", role="wizard"), conversation("bad.png", "q", "a")]
    data = write_rows(tmp_path / "rows.json", [*good, *bad])
    with pytest.raises(RowError, match="unknown role 'wizard'"):
        train(tmp_path / "error", data, image_folder=tmp_path)
    with caplog.at_level("INFO"):
        log = train(tmp_path / "skip", data, image_folder=tmp_path, on_bad_row="skip")
    assert all(loss > 0 for loss in losses(log))
    report = caplog.messages[-1]
    assert report.startswith("2 invalid rows were skipped")
    assert "rows.json row 6: unknown role" in report
    assert "rows.json row 7: " in report
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "skip/bad_rows.jsonl").read_text().splitlines()]
    assert len(set(reasons)) == 2


def test_samples_per_second_count_mixture_weights(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json")
    (tmp_path / "mixture.yaml").write_text(f"- {{data_path: rows.json, image_folder: {IMAGES}, weight: 3}}")
    train(tmp_path / "out", tmp_path / "mixture.yaml", num_train_epochs=1)
    results = json.loads((tmp_path / "out/train_results.json").read_text())
    samples = results["train_samples_per_second"] * results["train_runtime"]
    assert samples == pytest.approx(3 * len(FACTS), rel=0.01)


# Failures that would otherwise train without target tokens, with a loss of 0.


def test_truncated_answers_are_an_error_and_never_a_loss_of_zero(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    with pytest.raises(RowError, match="no answer within the maximum sequence length of 40"):
        train(tmp_path / "error", data, model_max_length=40)
    with pytest.raises(YiVLError, match="no target token"):
        train(tmp_path / "skip", data, model_max_length=40, on_bad_row="skip")
    assert losses(read_log(tmp_path / "skip/log.jsonl")) == []


def test_a_log_line_has_the_loss_of_its_steps_if_only_the_last_is_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    # Row 0 is that of step 2.
    rows = [conversation("bad.png", "q", "a"), *(conversation(None, "q", f"{i}") for i in range(3))]
    changes: dict[str, Any] = {"logging_steps": 0.5, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    changes["image_folder"] = tmp_path
    with caplog.at_level("WARNING"):
        log = train(tmp_path / "out", write_rows(tmp_path / "rows.json", rows), **changes, on_bad_row="skip")
    assert "step 2: no target token, all of its samples were left out" in caplog.messages
    assert [line["step"] for line in log if "loss" in line] == [2, 4]


def test_a_tokenizer_with_another_stop_token_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    corpus = tmp_path / "corpus.txt"
    # Tokens may span blanks here, so "### Human" becomes one, and the stop string none.
    corpus.write_text("### Human: one\n### Assistant: two\n" * 100, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "other"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    shutil.copy(tmp_path / "other.model", model / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model: merges text across the boundary of an answer; .*$"):
        train(tmp_path / "out", write_rows(tmp_path / "rows.json"), model_name_or_path=model, dataloader_num_workers=1)


def test_a_dry_run_logs_the_plan_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_rows(tmp_path / "rows.json")
    with caplog.at_level("INFO"):
        main(flags(tmp_path / "out", data, dry_run=True, gradient_accumulation_steps=2))
    text = "\n".join(caplog.messages)
    assert "rows.json" in text
    assert "4 steps, global batch size 4 (2 per device x 2 accumulation steps x 1 processes)" in text
    assert "first batch: 2 samples" in text
    assert "estimated memory per GPU" in text
    bad = write_rows(tmp_path / "bad.json", [conversation("missing.png", "q", "a"), conversation(*FACTS[0])])
    with pytest.raises(RowError, match=r"bad\.json row 0: .*missing\.png: no such file") as error:
        main(flags(tmp_path / "out", bad, dry_run=True, dataloader_num_workers=1))
    assert "Traceback" not in str(error.value)
    main(flags(tmp_path / "out", bad, dry_run=True, on_bad_row="skip"))
    assert not (tmp_path / "out").exists()
