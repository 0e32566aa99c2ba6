"""The recipes of InternVL-Chat-V1-2: published numbers, printed commands, and the list of its data."""

import json
import shlex
from typing import Any

import pytest
import yaml
from support.golden import ROOT
from support.golden_internvl import GOLDEN
from support.training import run_script

from yivl.data.sources import read_sources
from yivl.train.arguments import Arguments, parse_arguments
from yivl.train.plan import RunPlan

COMMON = {
    "learning_rate": "1e-5",
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "save_steps": 200,
    "report_to": "tensorboard",
}
SECOND = COMMON | {"num_train_epochs": 1, "group_by_length": True, "drop_path_rate": 0, "save_total_limit": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    "finetune_v1_2": COMMON
    | {"num_train_epochs": 1, "group_by_length": True, "drop_path_rate": 0.4, "save_total_limit": 3}
    | {"per_device_train_batch_size": 8, "global_batch_size": 512, "unfreeze_mm_vision_tower": True},
    "finetune_v1_2_again": SECOND | {"per_device_train_batch_size": 4, "global_batch_size": 128},
    "finetune_v1_2_lora": SECOND
    | {"per_device_train_batch_size": 4, "global_batch_size": 16, "freeze_mm_mlp_adapter": True}
    | {"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "pretrain_v1_2": {"freeze_backbone": True, "unfreeze_mm_vision_tower": True}
    | {"global_batch_size": 8192, "max_steps": 4800},
}
"""Source: OpenGVLab/InternVL, shell/internvl1.2, and the model card for the pre-training."""

# GPUs, and the samples per GPU and accumulation steps that they get.
BATCHES = [
    ("finetune_v1_2", 64, (8, 1)),
    ("finetune_v1_2", 32, (8, 2)),
    ("finetune_v1_2_again", 16, (4, 2)),
    ("finetune_v1_2_lora", 2, (4, 2)),
    ("pretrain_v1_2", 128, (32, 2)),
]


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"configs/internvl/{name}.yaml").read_text(encoding="utf-8"))
    return found


def parse(name: str, *typed: str) -> Arguments:
    """Return the flags of the printed command."""
    printed = shlex.split(run_script(f"internvl/{name}.sh", *typed, MODEL="m", DATA="d", OUT="o", DRY_RUN=1, GPUS=8))
    arguments = printed[printed.index("yivl.train") + 1 :]
    assert f"{ROOT}/configs/internvl/{name}.yaml" in arguments
    return parse_arguments(arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_has_the_published_numbers(name: str) -> None:
    assert PUBLISHED[name].items() <= settings(name).items()
    assert (ROOT / f"scripts/internvl/{name}.sh").is_file()


@pytest.mark.parametrize(("name", "gpus", "batch"), BATCHES)
def test_the_published_number_of_gpus_gets_the_published_batches(
    name: str, gpus: int, batch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    arguments = parse(name, "--seed", "7")
    plan = RunPlan.of(arguments)
    assert (plan.per_device_train_batch_size, plan.gradient_accumulation_steps) == batch
    training = arguments.training
    assert (training.seed, training.bf16, training.deepspeed) == (7, True, str(ROOT / "scripts/zero3.json"))
    assert arguments.model.trains_language_model == (name not in ("finetune_v1_2_lora", "pretrain_v1_2"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_a_flag(name: str) -> None:
    assert parse(name).model.drop_path_rate == settings(name)["drop_path_rate"]


def test_the_parts_are_named_by_variables() -> None:
    printed = run_script("internvl/finetune_v1_2.sh", MODEL="llm", VIT="vit", PROJECTOR="p.pth", DATA="d", DRY_RUN=1)
    assert "--model_name_or_path llm --vision_tower vit --pretrain_mm_mlp_adapter p.pth --data_path d" in printed


def test_the_data_of_the_fine_tuning_are_the_nine_published_sets() -> None:
    sources = read_sources(str(ROOT / "configs/internvl/data_v1_2.json"))
    assert [(source.name, source.image_folder, source.stated_length) for source in sources] == [
        ("sharegpt4v_instruct_gpt4-vision_cap100k", "playground/data/", 102_025),
        ("llava_instruct_150k_zh", "playground/data/coco/", 157_712),
        ("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k", "playground/data/", 665_058),
        ("dvqa_train_200k", "playground/data/dvqa/", 200_000),
        ("chartqa_train_18k", "playground/data/chartqa/", 18_317),
        ("ai2d_train_12k", "playground/data/ai2d/", 12_413),
        ("docvqa_train_10k", "playground/data/docvqa/", 10_211),
        ("geoqa+", "playground/data/geoqa+/", 72_318),
        ("synthdog_en", "playground/data/synthdog-en/", 29_765),
    ]
    for source in sources:
        assert source.data_path == f"playground/opensource/{source.name}.jsonl"
        assert (source.weight, source.first_part) == (1, 1)


def test_the_recipes_train_the_parameters_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from hardware_table import describe_internvl

    counts = json.loads((GOLDEN / "internvl-chat-v1-2/counts.json").read_text())
    full, lora = (
        describe_internvl(f"--config {ROOT}/configs/internvl/{name}.yaml")
        for name in ("finetune_v1_2", "finetune_v1_2_lora")
    )
    assert [size.trainable for size in full.sizes] == [
        counts[name] for name in ("vision_model", "mlp1", "language_model")
    ]
    assert lora.trainable == counts["lora_r16_parameters"]
