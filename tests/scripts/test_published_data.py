"""The published recipes from official files to trained weights: prepare, check, stages 2 and 3 with their mixtures."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.golden import CHECKPOINT, ROOT
from support.published import write_published
from support.training import run_script

from yivl.data import check
from yivl.data.prepare import __main__ as prepare
from yivl.data.prepare.catalog import SOURCES
from yivl.data.sources import read_sources

STAGES = {"stage2.yaml": "2", "stage3.yaml": "3"}
NUMBER = 4
"""Records of every source."""


@pytest.mark.parametrize("mixture", STAGES)
def test_the_ready_mixtures_name_prepared_sources_of_their_stage(mixture: str) -> None:
    sources = read_sources(str(ROOT / "configs" / mixture))
    assert [source.name for source in sources] == [
        name
        for name, source in SOURCES.items()
        if STAGES[mixture] in source.stages and name != "sharegpt4v"  # the technical report, in a comment
    ]
    assert "# - name: sharegpt4v" in (ROOT / "configs/stage3.yaml").read_text()
    for source in sources:
        folder, name = Path(source.paths[0]).parent, Path(source.paths[0]).name
        path = folder / name
        expected = f"laion400m/{name}" if source.is_streamed else f"{source.name}.jsonl"
        assert path.resolve() == ROOT / "data" / expected
        assert source.is_streamed or Path(str(source.image_folder)).resolve() == ROOT / "data/images"
        assert source.max_rows == (50_000 if mixture == "stage3.yaml" else None)
    if mixture == "stage2.yaml":
        laion, *others = (source.weight for source in sources)
        assert (laion, round(sum(others), 2)) == (20, 4.8)  # Source: technical report, section 7.2


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a folder with the ready mixtures and, prepared, what they name."""
    write_published(tmp_path, NUMBER)
    for name in SOURCES:
        output = tmp_path / "data" / (f"{name}.jsonl" if SOURCES[name].rows else f"{name}.yaml")
        folder = tmp_path / "official" / name if SOURCES[name].rows else tmp_path / "data" / name
        command = ["prepare", name, "--source", str(folder), "--output", str(output)]
        if SOURCES[name].rows:
            command += ["--image-folder", str(tmp_path / "data/images")]
        monkeypatch.setattr(sys, "argv", command)
        prepare.main()
        assert "bad records" not in capsys.readouterr().out
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.parametrize("mixture", STAGES)
def test_check_finds_no_bad_row_in_prepared_sources(
    mixture: str, published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(published / "configs" / mixture)
    monkeypatch.setattr(sys, "argv", ["check", path, "--model-path", str(CHECKPOINT), "--workers", "0"])
    check.main()  # exits with 1 if a row is invalid
    printed = capsys.readouterr().out
    doubled = ("laion400m", "cllava", "llavar", "visual-genome")
    for source in read_sources(path):
        number = NUMBER * (2 if source.name in doubled else 1)
        assert f"{source.name}: {number} valid rows" in printed


@pytest.mark.slow
def test_stages_2_and_3_train_on_the_prepared_mixtures(published: Path) -> None:
    common = {"GLOBAL_BATCH": 4, "MICRO_BATCH": 2}
    flags = ["--image_size", 56, "--max_steps", 2, "--dataloader_num_workers", 0]
    model: Path = CHECKPOINT
    for stage in (2, 3):
        out = published / f"out/stage{stage}"
        data = published / f"configs/stage{stage}.yaml"
        printed = run_script(f"train_stage{stage}.sh", *flags, MODEL=model, DATA=data, OUT=out, **common)
        sources = json.loads((out / "training_run.json").read_text())["sources"]
        assert [source["source"] for source in sources] == [source.name for source in read_sources(str(data))]
        assert "laion400m" in printed if stage == 2 else "visual-genome" in printed
        assert json.loads((out / "train_results.json").read_text())["train_loss"] > 0
        model = out
