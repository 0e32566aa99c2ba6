"""The flags of training: stages set defaults, flags that are given win, no flag is ignored."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.training import ROOT
from transformers import HfArgumentParser, TrainingArguments

from yivl.errors import YiVLError
from yivl.train.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    YiVLTrainingArguments,
    _make_parser,
    parse_arguments,
)
from yivl.train.plan import RunPlan, as_dict, trainer_arguments
from yivl.train.refused import HIDDEN
from yivl.train.stages import STAGES

NEEDED = {"model_name_or_path": "model", "data_path": "rows.json", "output_dir": "out"}


def parse(**changes: Any) -> Arguments:
    values = NEEDED | changes
    arguments = parse_arguments([text for name, value in values.items() for text in (f"--{name}", str(value))])
    RunPlan.of(arguments)
    return arguments


@pytest.mark.parametrize("number", STAGES)
def test_a_stage_sets_the_published_defaults_and_flags_that_are_given_win(number: int) -> None:
    stage = STAGES[number]
    model, data, training = parse(stage=number)
    assert (model.image_size, model.freeze_backbone) == (stage["image_size"], number < 3)
    assert model.unfreeze_mm_vision_tower
    assert data.max_rows_per_source == (50_000 if number == 3 else None)
    assert training.learning_rate == stage["learning_rate"]
    assert training.others["max_grad_norm"] == stage["max_grad_norm"]
    assert training.num_train_epochs == stage["num_train_epochs"]
    assert RunPlan.of(Arguments(model, data, training)).gradient_accumulation_steps == stage["global_batch_size"]
    changed = parse(stage=number, learning_rate=3e-4, image_size=56, global_batch_size=6, max_rows_per_source=7)
    assert (changed.training.learning_rate, changed.model.image_size) == (3e-4, 56)
    assert (RunPlan.of(changed).gradient_accumulation_steps, changed.data.max_rows_per_source) == (6, 7)
    plan = RunPlan.of(parse(stage=number, gradient_accumulation_steps=4))
    assert plan.per_device_train_batch_size * 4 == stage["global_batch_size"]


def test_parsed_flags_cannot_be_changed() -> None:
    arguments = parse(max_grad_norm=0.5)
    for group in arguments:
        for field in dataclasses.fields(group):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(group, field.name, None)
    with pytest.raises(TypeError):
        arguments.training.others["max_grad_norm"] = 1  # type: ignore[index]


def test_saved_flags_hold_gradient_checkpointing_as_given() -> None:
    arguments = parse(gradient_checkpointing=True, vision_gradient_checkpointing=True, global_batch_size=4)
    saved = as_dict(arguments, trainer_arguments(arguments, RunPlan.of(arguments)))
    assert (saved["gradient_checkpointing"], saved["vision_gradient_checkpointing"]) == (True, True)
    assert (saved["global_batch_size"], saved["gradient_accumulation_steps"], saved["world_size"]) == (4, 4, 1)
    assert "others" not in saved


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("yivl.train.__main__", "--help"),
        ("yivl.train.__main__", "--learn_rate 1"),
        ("yivl.train.__main__", "--bits 4"),
        ("yivl.train.launch", "--help"),
        ("yivl.train.launch", "--nproc 2 --nope x.py"),
        ("yivl.train.merge", "--help"),
    ],
)
def test_help_and_wrong_flags_import_no_torch(module: str, argv: str) -> None:
    code = (
        f"import sys; sys.argv = {['program', *argv.split()]!r}\n"
        f"from yivl import command_line; import {module} as module\n"
        "try: command_line.run(module.main)\n"
        "finally: assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "AssertionError" not in result.stderr
    if argv == "--help":
        assert (result.returncode, result.stderr) == (0, "")
        assert "usage: " in result.stdout
    else:
        assert result.returncode == 2
        assert re.fullmatch(r"error: .*\n", result.stderr)


def test_flags_of_transformers_are_parsed_as_transformers_does() -> None:
    theirs, ours = HfArgumentParser(TrainingArguments), _make_parser()
    own = {field.name for field in dataclasses.fields(YiVLTrainingArguments)}
    checked = 0
    for action in theirs._actions:
        if action.dest in own | HIDDEN | {
            "train_sampling_strategy",
            "help",
            "debug",
            "parallelism_config",
            "liger_kernel_config",
        }:
            continue  # refused, or taking other values
        flag = next(option for option in action.option_strings if "-" not in option[2:])
        values = [str(choice) for choice in action.choices or ("3", "0.5", "true")]
        for value in values:
            try:
                expected = action.type(value) if callable(action.type) else action.const
            except (ValueError, argparse.ArgumentTypeError):
                with pytest.raises(YiVLError):
                    ours.parse_args([flag, value])
            else:
                words = [flag] if action.nargs == 0 else [flag, value]
                parsed = vars(ours.parse_args(words))[action.dest]
                assert (parsed, type(parsed)) == (expected, type(expected)), flag
            checked += 1
    assert checked > 200


def test_the_stage_table_is_the_model_cards() -> None:
    # Image size, language model, global batch, learning rate, gradient clip, epochs, rows of a source.
    # Source: Yi-VL model card.
    published = {
        1: (224, False, 4096, 1e-4, 0.5, 1, None),
        2: (448, False, 4096, 1e-4, 0.5, 1, None),
        3: (448, True, 256, 2e-5, 1.0, 2, 50_000),
    }
    assert STAGES.keys() == published.keys()
    for number in STAGES:
        model, data, training = parse(stage=number)
        found = (model.image_size, model.trains_language_model, training.global_batch_size, training.learning_rate)
        found += (training.others["max_grad_norm"], training.num_train_epochs, data.max_rows_per_source)
        assert found == published[number]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 4}, "--stage 4: expected one of 1, 2, 3"),
        ({"bits": 4}, "--bits 4: quantized weights cannot be trained; add --lora_enable"),
        ({"bits": 5}, "--bits: invalid choice"),
        ({"lora_enable": True, "freeze_backbone": True}, "--lora_enable adds adapters"),
        ({"lora_vision_tower": True}, "--lora_vision_tower has no effect without adapters; add --lora_enable True"),
        (
            {"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True},
            "--tune_mm_mlp_adapter trains the projector only",
        ),
        ({"model_name_or_path": ""}, "--model_name_or_path is missing"),
        ({"data_path": ""}, "--data_path is missing"),
        ({"output_dir": ""}, "--output_dir is missing"),
        ({"model_max_length": 0}, "--model_max_length 0 is not positive"),
        (
            {"global_batch_size": 5, "per_device_train_batch_size": 2},
            "--global_batch_size 5 is no multiple of 2, --per_device_train_batch_size 2 x 1 process",
        ),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5 is not between 0 and 1"),
        ({"resume_from_checkpoint": "x"}, "--resume_from_checkpoint: x is not supported: use --resume"),
        ({"train_sampling_strategy": "group_by_length"}, "use --group_by_length"),
        ({"eval_data_path": "rows.json"}, "--eval_data_path and --eval_strategy"),
        ({"lr_scheduler_type": "wavy"}, "--lr_scheduler_type: invalid choice: 'wavy'"),
        ({"bf16": "maybe"}, "--bf16: invalid value 'maybe': expected True or False"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json: cannot be read"),
        (
            {"lora_enable": True, "bits": 4, "deepspeed": ROOT / "scripts/zero3.json"},
            "--bits 4: ZeRO-3 cannot partition quantized weights",
        ),
        ({"lora_r": 16}, "--lora_r has no effect without adapters; add --lora_enable True"),
        ({"lora_enable": True, "lora_r": 0}, "--lora_r 0 is not positive"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0 is not positive"),
        ({"global_batch_size": 0}, "--global_batch_size 0 is not positive"),
        (
            {"global_batch_size": 8, "gradient_accumulation_steps": 3},
            "--global_batch_size 8 is no multiple of 3, --gradient_accumulation_steps 3 x 1 process",
        ),
        ({"save_only_model": True}, "--save_only_model: True is not supported"),
        ({"remove_unused_columns": True}, "--remove_unused_columns: True is not supported"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: 0.1 is not supported"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "--save_strategy: best is not supported"),
        ({"report_to": "wandb"}, "--report_to: wandb is not supported: it needs a package"),
        ({"learn_rate": 3}, "unknown flag --learn_rate (did you mean --learning_rate?)"),
        ({"zzz": 3}, "unknown flag --zzz; --help lists the flags"),
    ],
)
def test_wrong_flags_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(YiVLError, match=re.escape(message)) as error:
        parse(**changes)
    assert "\n" not in str(error.value)


def test_flags_of_several_processes_are_checked_once() -> None:
    words = "--nproc-per-node 2 --nnodes 3 -m yivl.train --global_batch_size 8 --model-path m --data d --output o"
    code = f"import sys; sys.argv = {['launch', *words.split()]!r}; from yivl import command_line; "
    code += "from yivl.train import launch; command_line.run(launch.main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "error: --global_batch_size 8 is no multiple of 6, "
        "--per_device_train_batch_size 1 (the default) x 6 processes\n"
    )


def test_the_help_has_our_flags_first() -> None:
    text = _make_parser().format_help()
    groups = [text.index(f"\n{title}:") for title in ("model", "data", "training", "transformers.TrainingArguments")]
    assert groups == sorted(groups)
    assert "--config YAML" in text[: groups[0]]
    assert not re.search("--(version|lazy_preprocess|push_to_hub)", text)


def test_errors_of_all_groups_are_in_one_message() -> None:
    with pytest.raises(YiVLError, match=r"^--model_name_or_path is .*; --data_path is .*; --output_dir is missing"):
        parse_arguments([])


def test_a_pattern_that_the_shell_expanded_is_reported() -> None:
    with pytest.raises(YiVLError, match=r"b\.tar: no flag takes this value; quote patterns"):
        parse_arguments([*["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "a.tar", "b.tar"]])


def test_flags_of_llava_and_of_the_lora_recipe_have_the_same_meaning() -> None:
    arguments = parse(
        vision_tower="vit",
        lora_enable=True,
        lora_r=8,
        bits=4,
        mm_projector_lr=2e-5,
        freeze_mm_mlp_adapter=True,
        group_by_modality_length=True,
        image_aspect_ratio="pad",
        image_folder="images",
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        gradient_checkpointing=True,
    )
    model, data, training = arguments
    assert (model.vision_tower, model.bits, training.mm_projector_lr) == ("vit", 4, 2e-5)
    assert data.group_by_modality_length
    args = trainer_arguments(arguments, RunPlan.of(arguments))
    assert args.get_warmup_steps(50) == 5
    assert training.gradient_checkpointing
    assert not args.gradient_checkpointing  # enabled per module, not by transformers


def test_every_flag_is_read() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "yivl/train").glob("*.py"))
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    groups: tuple[Any, ...] = (ModelArguments, DataArguments, YiVLTrainingArguments)
    own = [field.name for group in groups for field in dataclasses.fields(group) if field.name not in theirs]
    assert len(own) > 30
    for name in own:
        uses = re.findall(rf"\b\w+\.{name}\b", code)
        assert uses, f"--{name} is never read"


def test_the_mixture_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    from yivl.data.sources import DataSource

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        for entry in yaml.safe_load(block):
            DataSource(**entry)
