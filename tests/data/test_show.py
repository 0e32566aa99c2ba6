"""``python -m yivl.data.show``: one row with its targets, for every kind of model path."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.golden import CHECKPOINT, GOLDEN

from yivl.command_line import EMBEDDED_MODEL
from yivl.data import check, show
from yivl.errors import CheckpointError, YiVLError

DATA = GOLDEN / "training/data.json"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the program with flags and return what it prints."""

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["show", *map(str, flags)])
        show.main()
        return capsys.readouterr().out

    return run


def test_a_row_is_printed_with_its_targets_in_brackets(shown: Callable[..., str]) -> None:
    text = shown(DATA, 0, "--model-path", CHECKPOINT)
    assert "### Human: <image_placeholder>\nWhat is in this image?\n### Assistant:[ A small boat" in text
    assert "on a calm lake.\n###] \n98 tokens, " in text
    text = shown(DATA, 1, "--model-path", CHECKPOINT)
    assert "谢谢。" in text  # several byte tokens, shown as the characters they encode
    with pytest.raises(YiVLError, match=f"^{DATA}: no row 99$"):
        shown(DATA, 99, "--model-path", CHECKPOINT)


def test_a_row_of_another_dialect_is_printed_as_it_is_trained(
    shown: Callable[..., str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    said = [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"conversations": said, "images": ["a.jpg"], "system": "Be brief."}]))
    text = shown(path, 0, "--model-path", CHECKPOINT)
    assert text.startswith("Be brief.\n\n### Human: <image_placeholder>\nQ?\n### Assistant:[ A.\n###] \n")
    assert caplog.messages == [f"1 rows start with an answer, which is dropped: {path} row 0"]


def test_flags_may_come_before_between_and_after_the_values(shown: Callable[..., str]) -> None:
    model = ("--model-path", CHECKPOINT)
    expected = shown(DATA, 1, *model)
    for words in ((DATA, *model, 1), (*model, DATA, 1), ("--data_path", DATA, 1, *model), (1, *model, "--data", DATA)):
        assert shown(*words) == expected
    for words, message in (
        ((DATA, *model), "expected a file and one row: DATA ROW; --help"),
        ((DATA, 1, *model, 2), "expected a file and one row"),
        ((1, DATA), "row: invalid int value: '.*data.json'"),
        ((DATA, 1, "--modle-path", "x"), "unknown flag --modle-path"),
    ):
        with pytest.raises(YiVLError, match=f"^{message}"):
            shown(*words)


def test_no_image_is_outside_a_folder_that_is_not_named(
    shown: Callable[..., str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    images = [f"{tmp_path}/a.jpg", "../b.jpg"]
    said = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": said, "images": images}]))
    shown(tmp_path / "rows.json", 0, "--model-path", CHECKPOINT)
    assert caplog.messages == []


def test_the_model_path_may_be_an_adapter_or_a_hub_id_and_is_the_embedded_model_by_default(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(CHECKPOINT)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    expected = shown(DATA, 0, "--model-path", CHECKPOINT)
    assert shown(DATA, 0, "--model-path", tmp_path) == expected
    assert shown(DATA, 0, "--model-path", tmp_path, "--model-base", CHECKPOINT) == expected
    assert shown(DATA, 0) == shown(DATA, 0, "--model-path", EMBEDDED_MODEL) != expected
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "photo_rgb.jpg", "text": "A photo."}]))
    for program, flags in ((show, ["0"]), (check, ["--workers", "0", "--image-folder", str(GOLDEN / "images")])):
        command = ["program", str(tmp_path / "rows.json"), *flags]
        for model_path in ("no-one/no-such-model", f"{tmp_path}/missing"):
            monkeypatch.setattr(sys, "argv", [*command, "--model-path", model_path])
            with pytest.raises(CheckpointError, match=f"^{model_path}: no such folder, and no model of that name"):
                program.main()
        for model_flags in ([], ["--model-path", str(tmp_path)]):
            monkeypatch.setattr(sys, "argv", [*command, *model_flags])
            program.main()
            assert capsys.readouterr().out
