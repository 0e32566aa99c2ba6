"""The shell scripts at tiny scale: flags, stages, fine-tuning, merging."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT
from support.models import wide_checkpoint
from support.serving import free_port
from support.training import (
    FACTS,
    IMAGES,
    QUESTION,
    ROOT,
    VIT,
    conversation,
    losses,
    run_script,
    script_flags,
    weights,
    write_language_model,
    write_rows,
    write_shards,
)

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import YiVLError
from yivl.inference.chat import Chat
from yivl.train.arguments import Arguments, parse_arguments
from yivl.train.plan import RunPlan, trainer_arguments
from yivl.train.run_log import read_log

SCRIPTS = [
    "train_stage1.sh",
    "train_stage2.sh",
    "train_stage3.sh",
    "finetune.sh",
    "finetune_lora.sh",
    "finetune_qlora.sh",
]


def ask(model: Path, question: str, image: str | None = None) -> str:
    """Ask through the entry script and return its answer."""
    command = [sys.executable, "single_inference.py", "--model-path", str(model), "--question", question, "--json"]
    command += ["--image-file", str(IMAGES / image)] if image else []
    result = subprocess.run(
        [*command, "--temperature", "0", "--max-new-tokens", "24"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return str(json.loads(result.stdout)["outputs"])


# The printed command.


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("gpus", [0, 8])
def test_the_printed_command_parses_and_flags_of_the_user_win(
    script: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["--learning_rate", "7e-3", *script_flags(Path("M"), "D", Path("O"))]
    printed = run_script(script, *typed, DRY_RUN=1, GPUS=gpus)
    command = shlex.split(printed)
    arguments = command[command.index("yivl.train") + 1 :]
    if gpus:
        assert "--nproc-per-node" in command
        monkeypatch.setenv("WORLD_SIZE", "8")
    model, data, training = parse_arguments(arguments)
    RunPlan.of(Arguments(model, data, training))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cpu_arguments = parse_arguments([*arguments, "--tf32", "False"])  # without a GPU, transformers refuses it
    trainer_arguments(cpu_arguments, RunPlan.of(cpu_arguments))
    assert (model.model_name_or_path, data.data_path, training.output_dir) == ("M", "D", "O")
    assert training.learning_rate == 7e-3
    assert model.bits == (4 if "qlora" in script else 16)


def test_environment_variables_set_the_inputs_and_flags_win() -> None:
    environment = {"MODEL": "m", "DATA": "d e.json", "IMAGES": "i", "OUT": "o", "VIT": "v", "DRY_RUN": 1}
    printed = shlex.split(run_script("train_stage1.sh", "--data_path", "typed", **environment))
    model, data, training = parse_arguments(printed[printed.index("yivl.train") + 1 :])
    assert (model.model_name_or_path, model.vision_tower, model.stage) == ("m", "v", 1)
    assert (data.data_path, data.image_folder, training.output_dir) == ("typed", "i", "o")


def plan_of(monkeypatch: pytest.MonkeyPatch, script: str, *typed: str, **environment: Any) -> tuple[int, int]:
    """Return the micro-batch size and the accumulation steps of the printed command."""
    printed = run_script(script, *script_flags(Path("M"), "D", Path("O")), *typed, DRY_RUN=1, **environment)
    command = shlex.split(printed)
    monkeypatch.setenv("WORLD_SIZE", str(environment.get("PROCESSES", 1)))
    plan = RunPlan.of(parse_arguments(command[command.index("yivl.train") + 1 :]))
    return plan.per_device_train_batch_size, plan.gradient_accumulation_steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_batch_sizes_of_the_user_win(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    micro, steps, total = ("--per_device_train_batch_size", "--gradient-accumulation-steps", "--global_batch_size")
    assert plan_of(monkeypatch, script, micro, "4", steps, "8", PROCESSES=2) == (4, 8)
    assert plan_of(monkeypatch, script, micro, "4", total, "64", PROCESSES=2) == (4, 8)
    assert plan_of(monkeypatch, script, steps, "8", total, "64", PROCESSES=2) == (4, 8)
    assert plan_of(monkeypatch, script, total, "2", PROCESSES=2) == (1, 1)
    assert plan_of(monkeypatch, script, GLOBAL_BATCH=16, MICRO_BATCH=4) == (4, 4)
    assert plan_of(monkeypatch, script, total, "8", GLOBAL_BATCH=16, MICRO_BATCH=4) == (4, 2)
    with pytest.raises(YiVLError, match="--global_batch_size 16 is not 32, --per_device_train_batch_size 4 x "):
        plan_of(monkeypatch, script, micro, "4", steps, "8", GLOBAL_BATCH=16)
    with pytest.raises(YiVLError, match="--global_batch_size 256 is no multiple of 14"):
        plan_of(monkeypatch, script, GLOBAL_BATCH=256, MICRO_BATCH=2, PROCESSES=7)


def test_a_configuration_wins_over_the_script_and_flags_over_both(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "deepspeed: mine.json\nbf16: false\noptim: adamw_torch\nlearning_rate: 1e-3\nnum_train_epochs: 7\n"
    )
    typed = ["--config", str(config), "--num_train_epochs", "5"]
    for script in SCRIPTS:
        printed = shlex.split(run_script(script, *script_flags(Path("M"), "D", Path("O")), *typed, DRY_RUN=1, GPUS=2))
        training = parse_arguments(printed[printed.index("yivl.train") + 1 :]).training
        assert (training.deepspeed, training.bf16, training.learning_rate) == ("mine.json", False, 1e-3)
        assert (training.others["optim"], training.others["tf32"], training.num_train_epochs) == (
            "adamw_torch",
            True,
            5,
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_input_is_one_line_and_exit_code_2(script: str) -> None:
    result = subprocess.run(
        [f"scripts/{script}", "--data_path", "rows.json", "--output_dir", "out"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "MODEL"}
        | {"GPUS": "0", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --model_name_or_path is missing")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("zero*.json")), ids=lambda path: path.name)
def test_deepspeed_configurations_match_their_names(path: Path) -> None:
    settings = json.loads(path.read_text())
    zero = settings["zero_optimization"]
    assert path.name.startswith(f"zero{zero['stage']}")
    assert ("offload_optimizer" in zero) == ("offload" in path.name)
    assert "optimizer" not in settings  # DeepSpeed's optimizer has one learning rate for all parts of the model
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"]


# Runs.


@pytest.mark.slow
def test_relative_paths_start_at_the_working_directory(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, "q", "a")])
    result = subprocess.run(
        [
            ROOT / "scripts/finetune.sh",
            "--model_name_or_path",
            CHECKPOINT,
            "--data_path",
            "rows.json",
            "--output_dir",
            "out",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "GPUS": "0", "GLOBAL_BATCH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.slow
def test_the_three_stages_in_sequence_yield_a_model_that_answers(loaded: LoadedModel, tmp_path: Path) -> None:
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    shards = write_shards(tmp_path / "shards", 2, 8)
    (tmp_path / "mixture.yaml").write_text(
        f"- {{data_path: '{shards}', weight: 2}}\n- {{data_path: rows.json, image_folder: {IMAGES}}}\n"
    )
    rows = write_rows(tmp_path / "rows.json")
    small = {"GLOBAL_BATCH": 4, "MICRO_BATCH": 2}
    stages = [tmp_path / f"stage{number}" for number in (1, 2, 3)]
    run_script(
        "train_stage1.sh",
        *script_flags(
            language_model, shards, stages[0], vision_tower=VIT, image_size=28, max_steps=3, learning_rate=1e-2
        ),
        **small,
    )
    run_script(
        "train_stage2.sh",
        *script_flags(stages[0], tmp_path / "mixture.yaml", stages[1], image_size=56, max_steps=3, learning_rate=1e-2),
        **small,
    )
    run_script("train_stage3.sh", *script_flags(stages[1], rows, stages[2], image_size=56, num_train_epochs=2), **small)
    results = [weights(stage) for stage in stages]
    position = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    assert [len(result[position]) for result in results] == [5, 17, 17]
    before = loaded.model.state_dict()
    for name in before:
        if not name.startswith(("model.vision_tower.", "model.mm_projector.")):
            assert torch.equal(results[1][name], before[name])  # frozen in the first two stages
            assert not torch.equal(results[2][name], before[name])
    assert not torch.equal(results[0]["model.mm_projector.0.weight"], results[1]["model.mm_projector.0.weight"])
    assert json.loads((stages[2] / "train_results.json").read_text())["train_samples_per_second"] > 0
    ask(stages[2], "图里有什么？", "photo_rgb.jpg")


@pytest.mark.slow
def test_fine_tuning_overfits_eight_samples_and_the_entry_script_answers_them(tmp_path: Path) -> None:
    out, rows = tmp_path / "out", write_rows(tmp_path / "rows.json")
    common: dict[str, Any] = {
        "num_train_epochs": 100,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "report_to": "none",
    }
    run_script(
        "finetune.sh",
        *script_flags(CHECKPOINT, rows, out, **common, freeze_mm_mlp_adapter=False),
        GLOBAL_BATCH=8,
        MICRO_BATCH=8,
    )
    assert losses(read_log(out / "log.jsonl"))[-1] < 0.01
    chat = Chat.from_pretrained(str(out), device="cpu")
    for image, question, answer in FACTS:
        chat.reset()
        assert chat.ask(question, image and str(IMAGES / image), temperature=0, max_new_tokens=24) == answer
    for image, question, answer in (FACTS[1], FACTS[5]):
        assert ask(out, question, image) == answer


@pytest.mark.slow
def test_a_lora_adapter_is_trained_merged_and_answers(tmp_path: Path) -> None:
    out, merged, rows = tmp_path / "lora", tmp_path / "merged", write_rows(tmp_path / "rows.json")
    changes: dict[str, Any] = {
        "num_train_epochs": 20,
        "learning_rate": 1e-2,
        "freeze_mm_mlp_adapter": False,
        "save_steps": 5,
    }
    run_script("finetune_lora.sh", *script_flags(CHECKPOINT, rows, out, **changes), GLOBAL_BATCH=8, MICRO_BATCH=8)
    assert losses(read_log(out / "log.jsonl"))[-1] < 4
    run_script("merge_lora.sh", "--model-path", CHECKPOINT, "--lora-path", out, "--save-model-path", merged)
    for name in ("training_arguments.json", "training_run.json", "log.jsonl"):  # for the model card
        assert (merged / name).read_bytes() == (out / name).read_bytes()
    ids, images = torch.tensor([[294, 332, -200, 19, 748]]), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        base, adapted, plain = (
            load_model(path, device="cpu", dtype="float32").model(ids, images=images).logits
            for path in (CHECKPOINT, out, merged)
        )
    torch.testing.assert_close(plain, adapted, atol=1e-5, rtol=1e-5)
    assert (plain - base).abs().max() > 0.1
    assert ask(merged, QUESTION, "photo_rgb.jpg") == ask(out, QUESTION, "photo_rgb.jpg")
    # A checkpoint of the run is an adapter too, projector included.
    with torch.no_grad():
        midway = load_model(out / "checkpoint-10", device="cpu", dtype="float32").model(ids, images=images).logits
    assert (midway - adapted).abs().max() > 1e-3
    assert (out / "checkpoint-10/non_lora_trainables.safetensors").is_file()
    result = subprocess.run(
        ["scripts/merge_lora.sh", "--model-path", CHECKPOINT, "--lora-path", out, "--save-model-path", out],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "give another --save-model-path" in result.stderr
    other = tmp_path / "other"
    printed = run_script("merge_lora.sh", "--model-path", merged, "--lora-path", out, "--save-model-path", other)
    assert f"the adapter was trained on {CHECKPOINT}, and is merged into {merged}" in printed
    with pytest.raises(AssertionError, match=r"adapter_config\.json is missing"):
        run_script("merge_lora.sh", "--model-path", CHECKPOINT, "--lora-path", merged, "--save-model-path", other)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_is_trained_and_merged_into_the_unquantized_base(bits: int, tmp_path: Path) -> None:
    wide, out, merged = wide_checkpoint(tmp_path / "wide"), tmp_path / "qlora", tmp_path / "merged"
    rows = write_rows(tmp_path / "rows.json")
    run_script(
        "finetune_qlora.sh",
        *script_flags(
            wide, rows, out, num_train_epochs=30, learning_rate=1e-2, lora_r=16, bits=bits, save_strategy="no"
        ),
        GLOBAL_BATCH=8,
        MICRO_BATCH=8,
    )
    curve = losses(read_log(out / "log.jsonl"))
    assert curve[-1] < curve[0] - 1.5
    assert not (out / "non_lora_trainables.safetensors").exists()  # the projector is frozen
    run_script("merge_lora.sh", "--model-path", wide, "--lora-path", out, "--save-model-path", merged)
    before, after = weights(wide), weights(merged)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {
        name for name in before if re.search(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj\.weight", name)
    }
    ask(merged, QUESTION, "photo_rgb.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training.md", "data.md"])
def test_commands_of_the_documentation_run_as_written(name: str, tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = [line for block in blocks for line in block.splitlines() if "/tmp/" in line]
    assert lines
    for line in lines:
        command = line.replace("/tmp/", f"{tmp_path}/").replace(".venv/bin/python", shlex.quote(sys.executable))
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == ("data.check" in line), f"{command}\n{result.stderr}"  # nine rows there are bad


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_row_in_a_data_loading_worker_is_one_line(processes: int, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = write_rows(tmp_path / "rows.json", [conversation("bad.png", "q", "a")] * processes)
    flags = script_flags(CHECKPOINT, rows, tmp_path / "out", image_folder=tmp_path, dataloader_num_workers=1)
    result = subprocess.run(
        ["scripts/finetune.sh", *flags],
        cwd=ROOT,
        env=os.environ
        | {"PYTHON": sys.executable, "GPUS": "0", "GLOBAL_BATCH": str(processes), "PROCESSES": str(processes)}
        | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    last = errors[-1]
    assert re.match(rf"error: {rows} row \d: {tmp_path}/bad\.png: not a readable image", last)
    assert "--on_bad_row skip" in last
