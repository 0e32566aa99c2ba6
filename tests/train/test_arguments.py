"""The flags of training: stages set defaults, typed flags win, nothing is ignored."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.training import ROOT

from yivl.errors import YiVLError
from yivl.train.arguments import Arguments, DataArguments, ModelArguments, YiVLTrainingArguments, parse_arguments
from yivl.train.stages import STAGES

NEEDED = {"model_name_or_path": "model", "data_path": "rows.json", "output_dir": "out"}


def parse(**changes: Any) -> Arguments:
    values = NEEDED | changes
    return parse_arguments([text for name, value in values.items() for text in (f"--{name}", str(value))])


@pytest.mark.parametrize("number", STAGES)
def test_a_stage_sets_the_published_numbers_and_a_typed_flag_wins(number: int) -> None:
    stage = STAGES[number]
    model, data, training = parse(stage=number)
    assert (model.image_size, model.freeze_backbone) == (stage.image_size, not stage.train_language_model)
    assert model.unfreeze_mm_vision_tower
    assert data.max_rows_per_source == stage.max_rows_per_source
    assert (training.learning_rate, training.max_grad_norm) == (stage.learning_rate, stage.max_grad_norm)
    assert training.num_train_epochs == stage.num_train_epochs
    assert training.gradient_accumulation_steps == stage.global_batch_size
    changed = parse(stage=number, learning_rate=3e-4, image_size=56, global_batch_size=6, max_rows_per_source=7)
    assert (changed.training.learning_rate, changed.model.image_size) == (3e-4, 56)
    assert (changed.training.gradient_accumulation_steps, changed.data.max_rows_per_source) == (6, 7)


def test_the_stage_table_is_the_model_cards() -> None:
    # Image size, language model, global batch, learning rate, gradient clip, epochs. Source: Yi-VL model card.
    published = {
        1: (224, False, 4096, 1e-4, 0.5, 1),
        2: (448, False, 4096, 1e-4, 0.5, 1),
        3: (448, True, 256, 2e-5, 1.0, 2),
    }
    for number, stage in STAGES.items():
        assert dataclasses.astuple(stage)[:-1] == published[number]
    assert STAGES[3].max_rows_per_source == 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 4}, "--stage 4: expected one of 1, 2, 3"),
        ({"bits": 4}, "--bits 4: quantized weights cannot be trained; add --lora_enable"),
        ({"bits": 5}, "argument --bits: invalid choice"),
        ({"lora_enable": True, "freeze_backbone": True}, "--lora_enable puts adapters"),
        ({"lora_vision_tower": True}, "--lora_vision_tower goes with --lora_enable"),
        (
            {"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True},
            "--tune_mm_mlp_adapter trains the projector alone",
        ),
        ({"model_name_or_path": ""}, "--model_name_or_path is missing"),
        ({"data_path": ""}, "--data_path is missing"),
        ({"output_dir": ""}, "--output_dir is missing"),
        ({"model_max_length": 0}, "--model_max_length 0 is not positive"),
        ({"global_batch_size": 5, "per_device_train_batch_size": 2}, "--global_batch_size 5 is no multiple of 2"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5 is not between 0 and 1"),
        ({"resume_from_checkpoint": "x"}, "--resume_from_checkpoint is not supported: use --resume"),
        ({"train_sampling_strategy": "group_by_length"}, "use --group_by_length"),
        ({"eval_data_path": "rows.json"}, "--eval_data_path and --eval_strategy"),
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"lora_r": 16}, "--lora_r says how adapters are made; add --lora_enable True"),
        ({"lora_enable": True, "lora_r": 0}, "--lora_r 0 is not positive"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0 is not positive"),
        ({"global_batch_size": 0}, "--global_batch_size 0 is not positive"),
        (
            {"global_batch_size": 8, "gradient_accumulation_steps": 4},
            "--global_batch_size sets --gradient_accumulation",
        ),
        ({"save_only_model": True}, "--save_only_model is not supported"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor is not supported"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "--save_strategy best is not supported"),
        ({"report_to": "wandb"}, "--report_to wandb needs a package"),
        ({"learn_rate": 3}, "unknown flag --learn_rate; did you mean --learning_rate?"),
        ({"zzz": 3}, "unknown flag --zzz; --help lists the flags"),
    ],
)
def test_contradictions_and_mistakes_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(YiVLError, match=re.escape(message)) as error:
        parse(**changes)
    assert "\n" not in str(error.value)


def test_a_pattern_that_the_shell_expanded_is_recognized() -> None:
    with pytest.raises(YiVLError, match=r"b\.tar: which flag is it for\? A pattern .* needs quotes"):
        parse_arguments([*["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "a.tar", "b.tar"]])


def test_flags_of_the_lineage_and_of_the_seed_recipe_mean_the_same() -> None:
    model, data, training = parse(
        vision_tower="vit",
        lora_enable=True,
        lora_r=8,
        bits=4,
        mm_projector_lr=2e-5,
        freeze_mm_mlp_adapter=True,
        group_by_modality_length=True,
        image_aspect_ratio="pad",
        image_folder="pictures",
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        gradient_checkpointing=True,
    )
    assert (model.vision_tower, model.bits, training.mm_projector_lr) == ("vit", 4, 2e-5)
    assert data.group_by_modality_length
    assert training.get_warmup_steps(50) == 5
    assert training.recompute_language_model
    assert not training.gradient_checkpointing  # chosen layer by layer, not by transformers


def test_every_flag_is_read() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "yivl/train").glob("*.py"))
    own: list[str] = []
    for group in (ModelArguments, DataArguments, YiVLTrainingArguments):
        inherited = (
            {field.name for field in dataclasses.fields(group.__mro__[1])} if group.__mro__[1] is not object else set()
        )
        own += [field.name for field in dataclasses.fields(group) if field.name not in inherited]
    assert len(own) > 30
    for name in own:
        uses = re.findall(rf"\b\w+\.{name}\b", code)
        assert uses, f"--{name} is never read"


def test_the_mixture_in_the_documents_is_one_that_can_be_read(tmp_path: Path) -> None:
    from yivl.data.sources import DataSource

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        for entry in yaml.safe_load(block):
            DataSource(**entry)
