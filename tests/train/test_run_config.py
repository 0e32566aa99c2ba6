"""Configuration files: flags win, wrong keys and values are named, and the file of a run repeats it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.training import CHECKPOINT, IMAGES, ROOT, flags, losses, train, weights, write_rows

from yivl.errors import CheckpointError, YiVLError
from yivl.train.__main__ import main
from yivl.train.arguments import parse_arguments
from yivl.train.run_log import read_log

NEEDED = "model-path: m\ndata: rows.json\noutput_dir: out\n"


def parse(text: str, folder: Path, *words: str) -> Any:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_arguments(["--config", str(path), *words])


def test_keys_are_flags_and_values_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    text = f"{NEEDED}learning-rate: 1e-5\neval_strategy: no\nbf16: yes\nwarmup_ratio:\nadam_beta1: 0.8\n"
    model, data, training = parse(f"{text}lr_scheduler_kwargs: {{min_lr: 1.0e-6}}\n", tmp_path)
    assert (model.model_name_or_path, data.data_path, training.output_dir) == ("m", "rows.json", "out")
    assert (training.learning_rate, training.eval_strategy, training.bf16) == (1e-5, "no", True)
    assert (training.warmup_ratio, training.others["adam_beta1"]) == (None, 0.8)
    # Transformers reads it.
    assert training.others["lr_scheduler_kwargs"] == '{"min_lr": 1e-06}'


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    text = f"{NEEDED}stage: 3\nlearning_rate: 1e-5\nwarmup_ratio: 0.1\nmax_steps: 5\nlora_enable: true\nlora_r: 4\n"
    arguments = parse(text, tmp_path)
    assert (arguments.training.learning_rate, arguments.training.num_train_epochs) == (1e-5, 2)
    changed = parse(text, tmp_path, "--learning_rate", "3e-5", "--lora_r", "2", "--config", "{lora_r: 3, seed: 7}")
    assert (changed.training.learning_rate, changed.model.lora_r, changed.training.seed) == (3e-5, 2, 7)
    # A flag also wins over a key that would make it void.
    words = ("--warmup_steps", "7", "--num_train_epochs", "9", "--lora_enable", "False")
    model, _, training = parse(text, tmp_path, *words)
    assert (training.warmup_steps, training.warmup_ratio) == (7, None)
    assert (training.num_train_epochs, training.max_steps) == (9, -1)
    assert (model.lora_enable, model.lora_r) == (False, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learn_rate: 1\n\nlearning_rate: fast\nnope: 1",
            "line 1, unknown key learn_rate (did you mean learning_rate?); line 3, learning_rate: invalid float value: "
            "'fast'; line 4, unknown key nope",
        ),
        ("bf16: maybe", "line 1, bf16: invalid value 'maybe': expected True or False"),
        ("output_dir: [a, b]", "line 1, output_dir: expected one value"),
        ("seed: 1\nseed: 2", "line 2, seed is given twice"),
        ("data: a\ndata-path: b", "line 2, data_path is given twice"),
        ("config: other.yaml", "line 1, config: not allowed in a configuration"),
        ("help: true", "line 1, help: not allowed in a configuration"),
        ("version: v1", "line 1, version: v1 is not supported: Yi-VL has one prompt, mm_default"),
        ("- a\n- b", "expected a mapping of flags to values"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_wrong_keys_and_values_name_file_line_and_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match=re.escape(f"{tmp_path}/run.yaml: {message}")) as error:
        parse(text, tmp_path)
    assert "\n" not in str(error.value)


def test_a_home_folder_in_a_file_is_that_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder", "deepspeed")
    keys += ("eval_data_path", "output_dir", "resume")
    groups = parse("".join(f"{key}: ~/{key}\n" for key in keys), tmp_path, "--eval_strategy", "steps")
    given = {name: value for group in groups for name, value in vars(group).items()}
    assert [given[key] for key in keys] == [f"{tmp_path}/{key}" for key in keys]


def test_a_run_in_a_home_folder_is_resumed_and_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows, home = write_rows(tmp_path / "rows.json"), Path("~/out")
    main(flags(home, rows, max_steps=2, save_steps=1))
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/out: holds checkpoint-2 of a run")):
        main(flags(home, rows, max_steps=3))
    main(flags(home, rows, max_steps=3, resume="auto"))
    assert len(losses(read_log(tmp_path / "out/log.jsonl"))) == 3


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(YiVLError, match=r"--config nowhere\.yaml: No such file or directory; give a YAML file"):
        parse_arguments(["--config", "nowhere.yaml"])


def test_the_configuration_of_a_run_repeats_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    changes: dict[str, Any] = {"global_batch_size": 4, "adam_beta2": 0.99, "max_steps": 3, "lora_enable": True}
    log = train(
        tmp_path / "one", rows, **changes, lora_r=4, warmup_ratio=0.5, eval_data_path=rows, eval_strategy="epoch"
    )
    written = tmp_path / "one/training_config.yaml"
    main(["--config", str(written), "--output_dir", str(tmp_path / "two")])
    assert losses(read_log(tmp_path / "two/log.jsonl")) == losses(log)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((two[key] == value).all() for key, value in one.items())
    first, second = (yaml.safe_load((tmp_path / name / "training_config.yaml").read_text()) for name in ("one", "two"))
    assert first.pop("output_dir") != second.pop("output_dir")
    assert first == second
    assert (first["global_batch_size"], first["adam_beta2"], first["warmup_ratio"]) == (4, 0.99, 0.5)
    assert not {"resume", "dry_run", "warmup_steps", "gradient_accumulation_steps"} & first.keys()


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_the_numbers_of_both_recipes(name: str) -> None:
    words = ["--model-path", str(CHECKPOINT), "--data", "d", "--image-folder", str(IMAGES), "--output", "o"]
    base = ["--config", str(ROOT / f"configs/{name}.yaml")]
    theirs = parse_arguments([*base, "--config", str(ROOT / f"configs/{name}_01ai.yaml"), *words])
    model, data, training = theirs
    # Source: 01-ai/Yi, VL/scripts/finetune.sh and finetune_lora.sh of pull request 368.
    is_lora = name == "finetune_lora"
    assert (training.learning_rate, training.num_train_epochs, training.warmup_ratio) == (2e-5, 10, 0.03)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4 if is_lora else 1, 8)
    assert (training.lr_scheduler_type, training.weight_decay, data.model_max_length) == ("cosine", 0, 2048)
    assert (training.save_steps, training.save_total_limit, model.freeze_mm_mlp_adapter) == (200, 3, False)
    if is_lora:
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 16, 0.05)
    # Source: Deep-Spark/DeepSparkHub, models/nlp/llm/yi-vl-6b/pytorch.
    model, _, training = parse_arguments([*base, *words])
    rate, epochs, steps = (1e-4, 3, 8) if is_lora else (1e-5, 10, 2)
    assert (training.learning_rate, training.num_train_epochs, training.warmup_ratio) == (rate, epochs, 0.1)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, steps)
    assert (model.freeze_mm_mlp_adapter, model.lora_r, model.lora_alpha) == (True, 8, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 3_000, "nested more than 30 levels deep"),
        ("{a: " * 3_000, "nested more than 30 levels deep"),
        ("- " * 3_000, "nested more than 30 levels deep"),
        ("lr_scheduler_kwargs: &a [*a]", "nested more than 30 levels deep"),
        ("".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 60) if i else 'x'}]\n" for i in range(5)), "values"),
        ("- seed: 3", "expected a mapping of flags to values"),
        ("? [1, 2]\n: 3", "line 1, a key is no name of a flag"),
        ("? {a: 1}\n: 3", "line 1, a key is no name of a flag"),
        ("lr_scheduler_kwargs: {[1]: 2}", "lr_scheduler_kwargs: not valid YAML"),
        ("lr_scheduler_kwargs: {a: 2020-01-01}", "lr_scheduler_kwargs: expected JSON values"),
        ("lr_scheduler_kwargs: [!!int x]", "lr_scheduler_kwargs: not valid YAML"),
        ("lr_scheduler_kwargs: [!!python/object/apply:os.getcwd []]", "lr_scheduler_kwargs: not valid YAML"),
        ("seed: *nothing", "not valid YAML"),
        ("1: a\nseed: 3\nnull: 4", "line 1, unknown key 1; line 3, unknown key null"),
        ("x" * 2**21, "more than 1,048,576 characters"),
    ],
    ids=lambda text: text[:40],
)
def test_a_hostile_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match=r"run\.yaml") as caught:
        parse(text, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_within_the_limits_are_read(tmp_path: Path) -> None:
    text = f"{NEEDED}learning_rate: &rate 2e-5\nmm_projector_lr: *rate\n"
    assert parse(text, tmp_path).training.learning_rate == 2e-5
