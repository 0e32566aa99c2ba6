"""The recipes of InternVL-Chat-V1-2 at tiny scale: from the parts to a model that answers, with and without ZeRO-3."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden_internvl import CHECKPOINT
from support.internvl_parts import NUM_IMAGE_TOKENS, Parts, write_parts
from support.training import FACTS, IMAGES, conversation, losses, run_script, weights

from yivl.checkpoint.loading import load_model
from yivl.inference.chat import Chat
from yivl.train.run_log import read_log

pytestmark = pytest.mark.slow


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return write_parts(tmp_path / "parts")


def write_meta(folder: Path) -> Path:
    """Write eight rows, four of them with an image, and their meta file."""
    rows = [conversation(*fact) for fact in FACTS]
    for row in rows:
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image_placeholder>", "<image>")
    (folder / "facts.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    source = {"root": f"{IMAGES}/", "annotation": str(folder / "facts.jsonl"), "repeat_time": 1, "length": len(rows)}
    (folder / "meta.json").write_text(json.dumps({"facts": source | {"data_augment": False}}))
    return folder / "meta.json"


def run(recipe: str, model: Path, data: Path, out: Path, *flags: str, **environment: Any) -> list[float]:
    """Run a recipe and return its losses."""
    common = ("--dataloader_num_workers", "0", "--report_to", "none", *flags)
    run_script(f"internvl/{recipe}.sh", *common, MODEL=model, DATA=data, OUT=out, **environment)
    return losses(read_log(out / "log.jsonl"))


def answers(folder: Path) -> list[str]:
    chat = Chat(load_model(folder, device="cpu", dtype="float32"))
    found = []
    for image, question, _ in FACTS:
        chat.reset()
        found.append(chat.ask(question, [IMAGES / image] if image else [], temperature=0, max_new_tokens=24))
    return found


def test_parts_are_fine_tuned_to_a_model_that_answers_and_its_adapter_is_merged(parts: Parts, tmp_path: Path) -> None:
    data, out = write_meta(tmp_path), tmp_path / "out"
    flags = ("--max_steps", "60", "--learning_rate", "3e-3", "--drop_path_rate", "0.1", "--save_strategy", "no")
    environment = {"VIT": parts.vit, "PROJECTOR": parts.projector, "GLOBAL_BATCH": 8}
    curve = run("finetune_v1_2", parts.language_model, data, out, *flags, **environment)
    assert curve[0] > 5
    assert curve[-1] < 0.1
    assert weights(out).keys() == weights(CHECKPOINT).keys()
    assert answers(out) == [answer for *_, answer in FACTS]

    adapter, merged = tmp_path / "lora", tmp_path / "merged"
    run("finetune_v1_2_lora", out, data, adapter, "--max_steps", "4", "--learning_rate", "1e-2", GLOBAL_BATCH=8)
    run_script("merge_lora.sh", "--model-path", out, "--lora-path", adapter, "--save-model-path", merged)
    before, after = weights(out), weights(merged)
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("language_model.model.layers.") for key in changed)
    assert answers(merged) == answers(adapter)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU operators with g++")
def test_two_ranks_under_zero_3_train_from_parts_as_one_process(parts: Parts, tmp_path: Path) -> None:
    """Four of eight rows have no image: ranks without one run the ViT, too."""
    data, parameters = write_meta(tmp_path), ("--group_by_length", "False", "--drop_path_rate", "0")
    zero: dict[str, Any] = {"GLOBAL_BATCH": 4, "MICRO_BATCH": 1, "DEEPSPEED": "scripts/zero3.json", "PROCESSES": 2}
    start, flags = tmp_path / "start", (*parameters, "--max_steps", "4", "--learning_rate", "1e-3")
    once = (*parameters, "--max_steps", "1", "--learning_rate", "0")
    run("finetune_v1_2", parts.language_model, data, start, *once, **zero, VIT=parts.vit, PROJECTOR=parts.projector)
    found, golden = weights(start), weights(CHECKPOINT)
    assert found.keys() == golden.keys()
    for key, value in found.items():
        kept = slice(-NUM_IMAGE_TOKENS if key.endswith(("embed_tokens.weight", "lm_head.weight")) else None)
        assert torch.equal(value[kept], golden[key][kept]), key
    assert found["language_model.model.embed_tokens.weight"][-NUM_IMAGE_TOKENS:].std() == pytest.approx(0.02, rel=0.2)
    two = run("finetune_v1_2", start, data, tmp_path / "two", *flags, **zero)
    one = run("finetune_v1_2", start, data, tmp_path / "one", *flags, GLOBAL_BATCH=4, MICRO_BATCH=1)
    assert two == pytest.approx(one, rel=1e-4)
    assert isinstance(Chat(load_model(tmp_path / "two", device="cpu")).ask("Who are you?", max_new_tokens=4), str)
