"""Upload and download against a server that speaks what the hub's library asks of the hub, and the model card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from support.golden import CHECKPOINT, ROOT
from support.hub import READER, TOKEN, Hub, Repository
from support.training import train, write_rows

from yivl.checkpoint.format import RECORD
from yivl.checkpoint.hub import MARKER, check_whole, download, is_edited
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import CheckpointError
from yivl.export.model_card import make_card, publish

VIT = "vit/clip-vit-tiny-random-yi-vl-56"
SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
REPO = "someone/tiny-yi-vl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROUND_TRIP = """
import sys
from pathlib import Path
from yivl.checkpoint.hub import download
from yivl.export.model_card import publish
source, target, repository = sys.argv[1:]
print(publish(Path(source), repository, private=True))
download(repository, Path(target))
"""


def test_what_was_uploaded_is_downloaded_byte_for_byte_and_loads(
    server: Hub, folder: Path, tmp_path: Path, loaded: LoadedModel
) -> None:
    """In a separate process, configured by environment variables alone."""
    (folder / VIT / "open_clip_pytorch_model.bin").write_bytes(b"a second ViT that no load reads")
    settings = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, str(folder), str(tmp_path / "again"), REPO],
        env=os.environ | settings | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == f"{server.address}/{REPO}/commit/{1:040x}"
    assert server.repositories[REPO].private
    assert contents(tmp_path / "again") == contents(CHECKPOINT) | {"README.md": (folder / "README.md").read_bytes()}
    assert sorted(server.repositories[REPO].commits[-1]) == sorted(
        [*contents(CHECKPOINT), "README.md", ".gitattributes"]
    )
    again, first = load_model(tmp_path / "again", device="cpu").model.state_dict(), loaded.model.state_dict()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_a_stopped_download_goes_on_with_the_files_that_are_missing(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder, REPO, private=False)
    hub.broken = {SHARDS[1]}
    hub.got.clear()
    target = tmp_path / "again"
    with pytest.raises(CheckpointError, match=rf"^{REPO}: the hub refused, .*\(500\)$"):
        download(REPO, target)
    assert not target.exists()
    partial = tmp_path / ".again.partial"
    finished = {name for name in contents(partial) if not name.startswith(".cache")}
    assert len(finished) > 3
    assert SHARDS[1] not in finished
    hub.broken = set()
    download(REPO, target)
    assert contents(target) == contents(CHECKPOINT) | {"README.md": (folder / "README.md").read_bytes()}
    assert {hub.got[name] for name in finished} == {1}
    assert not partial.exists()


def test_nothing_of_another_commit_is_left_in_a_download(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder, REPO, private=False)
    partial = tmp_path / ".again.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"what a stopped download of another commit left")
    (partial / SHARDS[0]).write_bytes(b"of another commit too")
    hub.repositories[REPO].commits.append({})
    download(REPO, tmp_path / "again", revision=f"{1:040x}")
    assert contents(tmp_path / "again") == contents(CHECKPOINT) | {"README.md": (folder / "README.md").read_bytes()}


@pytest.mark.parametrize("missing", [SHARDS[0], "tokenizer.model", "config.json", f"{VIT}/pytorch_model.bin"])
def test_a_repository_that_is_not_whole_gives_no_folder(missing: str, hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder, REPO, private=False)
    del hub.repositories[REPO].commits[-1][missing]
    with pytest.raises(CheckpointError, match=rf"^{REPO}: no complete checkpoint .*{Path(missing).name}"):
        download(REPO, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_holds_something_is_not_written_into(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(CheckpointError, match="not empty; give an empty"):
        download(REPO, folder)
    with pytest.raises(CheckpointError, match="not empty; give an empty"):
        download(REPO, folder / "config.json")
    assert contents(folder) == before


def test_an_empty_folder_is_taken(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder, REPO, private=False)
    (tmp_path / "empty").mkdir()
    download(REPO, tmp_path / "empty")
    check_whole(tmp_path / "empty")


def test_what_the_hub_refuses_is_one_clear_line(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"^someone/nothing: no such repository on the hub.* \(404\)$"):
        download("someone/nothing", tmp_path / "again")
    publish(folder, REPO, private=False)
    with pytest.raises(CheckpointError, match=rf"^{REPO}: no such revision"):
        download(REPO, tmp_path / "again", revision="v9")
    with pytest.raises(CheckpointError, match="not a name"):
        download("not a name", tmp_path / "again")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for action in (lambda: download(REPO, tmp_path / "again"), lambda: publish(folder, REPO, private=False)):
        with pytest.raises(CheckpointError, match=rf"^{REPO}: not found, or not for this token.*HF_TOKEN \(401\)$"):
            action()
    monkeypatch.setenv("HF_TOKEN", READER)
    for name in (REPO, "other/new"):
        with pytest.raises(CheckpointError, match=rf"^{name}: .*token may.*\(40[34]\)$"):
            publish(folder, name, private=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match=r"^no token for the hub: .*HF_TOKEN"):
        publish(folder, REPO, private=False)
    assert len(hub.repositories[REPO].commits) == 2
    assert list(hub.repositories) == [REPO]
    assert not (tmp_path / "again").exists()


def test_without_a_network_it_is_one_clear_line(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for action in (lambda: download(REPO, tmp_path / "again"), lambda: publish(folder, REPO, private=False)):
        with pytest.raises(CheckpointError, match=rf"^{REPO}: the hub cannot be reached \(.+\)$"):
            action()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"^{REPO}: the hub cannot be reached .*HF_HUB_OFFLINE"):
        download(REPO, tmp_path / "again")
    assert not (folder / "README.md").exists()


def test_a_stopped_upload_leaves_the_old_model_and_sends_nothing_twice(hub: Hub, folder: Path) -> None:
    publish(folder, REPO, private=False)
    sent = hub.got["PUT"]
    edit_json(folder / "config.json", image_aspect_ratio="square")
    hub.broken = {"PUT"}
    publish(folder, REPO, private=False)  # nothing large changed, so nothing large is sent
    assert hub.got["PUT"] == sent
    (folder / "tokenizer.model").write_bytes((CHECKPOINT / "tokenizer.model").read_bytes() + b"\n")
    commits = len(hub.repositories[REPO].commits)
    weights = torch.load(folder / SHARDS[0], weights_only=True)
    torch.save({key: value + 1 for key, value in weights.items()}, folder / SHARDS[0])
    shutil.copy(CHECKPOINT / "tokenizer.model", folder)
    with pytest.raises(CheckpointError, match=rf"^{REPO}: "):
        publish(folder, REPO, private=False)
    assert len(hub.repositories[REPO].commits) == commits
    hub.broken = set()
    publish(folder, REPO, private=False)
    assert hub.got["PUT"] == sent + 1
    assert hub.repositories[REPO].commits[-1][SHARDS[0]] == (folder / SHARDS[0]).read_bytes()


def test_weights_of_an_earlier_upload_go_and_other_files_stay(
    hub: Hub, folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    publish(folder, REPO, private=False)
    hub.repositories[REPO].commits[-1]["notes.txt"] = b"of its owner"
    loaded.model.save_pretrained(folder.parent / "new", tokenizer=loaded.tokenizer)
    loaded.image_processor.clip_processor.save_pretrained(folder.parent / "new" / VIT)
    publish(folder.parent / "new", REPO, private=False)
    files = hub.repositories[REPO].commits[-1]
    assert {name for name in files if name.endswith((".bin", ".safetensors", ".index.json"))} == {
        "model.safetensors",
        f"{VIT}/model.safetensors",
    }
    assert "notes.txt" in files


def test_a_repository_that_holds_something_else_is_left_alone(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.repositories["someone/llama"] = Repository(False, [{"config.json": b'{"model_type": "llama"}'}])
    hub.repositories["someone/adapter"] = Repository(False, [{"adapter_config.json": b"{}"}])
    hub.repositories["someone/public"] = Repository(False)
    with pytest.raises(CheckpointError, match=r"^someone/llama: exists and holds another kind of model"):
        publish(folder, "someone/llama", private=False)
    with pytest.raises(CheckpointError, match=r"^someone/adapter: exists and holds an adapter"):
        publish(folder, "someone/adapter", private=False)
    with pytest.raises(CheckpointError, match=r"^someone/public: exists and is public"):
        publish(folder, "someone/public", private=True)
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


BROKEN = {
    "a shard": (lambda f: (f / SHARDS[1]).unlink(), SHARDS[1]),
    "half a shard": (lambda f: (f / SHARDS[1]).write_bytes((f / SHARDS[1]).read_bytes()[:999]), SHARDS[1]),
    "the tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "the ViT": (lambda f: (f / VIT / "pytorch_model.bin").unlink(), "model.safetensors or pytorch_model.bin"),
    "the ViT's settings": (lambda f: (f / VIT / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "all": (lambda f: shutil.rmtree(f), "no such folder"),
    "a ViT elsewhere": (
        lambda f: (shutil.move(f / VIT, f.parent / "v"), edit_json(f / "config.json", mm_vision_tower="../v")),
        "mm_vision_tower='../v' is not in the folder",
    ),
    "a path": (
        lambda f: edit_json(f / "tokenizer_config.json", name_or_path="/home/someone/model"),
        "tokenizer_config.json: name_or_path is a local path",
    ),
    "a path below": (
        lambda f: edit_json(f / VIT / "config.json", text={"from": [r"C:\models\clip"]}),
        "config.json: text is a local path",
    ),
    "the license": (lambda f: (f / "LICENSE").write_text("All rights reserved."), "LICENSE: is another license"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_published_is_named_before_anything_is_sent(case: str, hub: Hub, folder: Path) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        publish(folder, REPO, private=False, license_id="apache-2.0")
    assert not hub.repositories
    assert not (folder / "README.md").exists()


def test_a_card_written_by_hand_is_kept_on_both_sides(hub: Hub, folder: Path) -> None:
    publish(folder, REPO, private=False)
    assert MARKER in (folder / "README.md").read_text(encoding="utf-8")
    files = hub.repositories[REPO].commits[-1]
    assert files["README.md"] == (folder / "README.md").read_bytes()
    files["README.md"] = b"# written on the hub"
    publish(folder, REPO, private=False)
    assert hub.repositories[REPO].commits[-1]["README.md"] == b"# written on the hub"
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# mine", encoding="utf-8")
    publish(folder, REPO, private=False)
    assert hub.repositories[REPO].commits[-1]["README.md"] == b"---\nlicense: mit\n---\n# mine"
    with pytest.raises(CheckpointError, match=r"README\.md: was edited by hand and is kept"):
        publish(folder, REPO, private=False, license_id="mit")


def test_a_card_in_another_encoding_is_one_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes("模型".encode("gbk"))
    assert is_edited(tmp_path / "README.md")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real runs over the same rows: of the whole model, and of adapters and the projector."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.json")
    measured = {"eval_data_path": rows, "eval_strategy": "epoch"}
    train(folder / "full", rows, report_to="tensorboard", **measured)
    train(folder / "lora", rows, lora_enable=True, lora_r=4, max_steps=3)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def test_an_output_folder_is_published_without_optimizers_and_paths(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert (run / "full/checkpoint-6/optimizer.pt").is_file()
    publish(run / "full", REPO, private=False)
    files = hub.repositories[REPO].commits[-1]
    vit = {f"{VIT}/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")}
    tokenizer = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    model = {"config.json", "generation_config.json", "model.safetensors", "README.md", ".gitattributes"}
    assert set(files) == vit | tokenizer | model | {"log.jsonl", "loss.png", "train_results.json"}
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
        assert str(ROOT).encode() not in data, name
    download(REPO, tmp_path / "again")
    assert load_model(tmp_path / "again", device="cpu").name == "again"


def test_an_adapter_is_published_with_the_name_of_its_base_and_loads(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run / "lora/adapter_config.json"
    recorded = config.read_text(encoding="utf-8")
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(CHECKPOINT), "../checkpoints/yi", "./out/stage2", "/models", "models/mine"):
        config.write_text(json.dumps(json.loads(recorded) | {"base_model_name_or_path": path}), encoding="utf-8")
        with pytest.raises(
            CheckpointError, match=r"adapter_config.json: names '.*' as its base; give the base model's"
        ):
            publish(run / "lora", REPO, private=True)
    config.write_text(recorded, encoding="utf-8")
    publish(run / "lora", REPO, private=True, base_model="someone/base")
    files = hub.repositories[REPO].commits[-1]
    assert {"adapter_model.safetensors", "non_lora_trainables.safetensors", "adapter_config.json"} < set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert str(CHECKPOINT).encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data["base_model_relation"]) == ("someone/base", "adapter")
    download(REPO, tmp_path / "again")
    prompt, ours = torch.tensor([[294, 332, 725, 19, 748]]), (run / "lora", tmp_path / "again")
    with torch.no_grad():
        one, other = (load_model(path, model_base=CHECKPOINT, device="cpu").model(prompt).logits for path in ours)
    assert torch.equal(one, other)
    (run / "lora/non_lora_trainables.safetensors").write_bytes(files["non_lora_trainables.safetensors"][:99])
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.safetensors: damaged"):
        publish(run / "lora", REPO, private=True, base_model="someone/base")
    (run / "lora/non_lora_trainables.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.safetensors: holds 0 of the \d+ tensors"):
        publish(run / "lora", REPO, private=True, base_model="someone/base")
    del hub.repositories[REPO].commits[-1]["adapter_model.safetensors"]
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        download(REPO, tmp_path / "third")
    shutil.copy(tmp_path / "again/non_lora_trainables.safetensors", run / "lora")
    hub.repositories["someone/whole"] = Repository(False, [{"config.json": (CHECKPOINT / "config.json").read_bytes()}])
    with pytest.raises(CheckpointError, match=r"^someone/whole: exists and holds a whole model"):
        publish(run / "lora", "someone/whole", private=False, base_model="someone/base")


def rows_of(card: str) -> dict[str, str]:
    """Return the two-column rows of all tables of a card."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


def test_a_card_tells_what_the_run_recorded(run: Path) -> None:
    for name in ("full", "lora", "full/checkpoint-6"):
        folder = run / name
        card = make_card(folder)
        flags = json.loads((folder / "training_arguments.json").read_text())
        lines = map(json.loads, (run / name.split("/")[0] / "log.jsonl").read_text().splitlines())
        log = [line for line in lines if line["step"] <= (6 if "checkpoint" in name else 8)]
        told = rows_of(card)
        assert told["initialized from"] == "`checkpoint`"
        assert told["optimizer steps"] == str(log[-1]["step"])
        assert told["global batch size"] == "2"
        last = [line for line in log if "loss" in line][-1]
        assert told[f"loss, at step {last['step']}"] == f"{last['loss']:.4f}"
        assert told["learning_rate"] == str(flags["learning_rate"])
        assert told["warmup_steps"] == str(flags["warmup_steps"])
        assert told["seed"] == "42"
        assert ("lora_r" in told, "max_steps" in told) == ((True, True) if name == "lora" else (False, False))
        assert ("num_train_epochs" in told) != ("max_steps" in told)
        record = json.loads((folder / RECORD).read_text())
        [source] = record["sources"]
        facts = [f"{source[key]:,}" for key in ("rows", "rows_per_epoch", "images")]
        assert f"| `rows.json` | {' | '.join(facts)} |" in card
        assert record["base_model"] is None
        assert f"torch {torch.__version__.split('+')[0]}" in card
        assert "Not recorded: " not in card
    measured = [
        line for line in map(json.loads, (run / "full/log.jsonl").read_text().splitlines()) if "eval_loss" in line
    ]
    card = make_card(run / "full")
    assert rows_of(card)["evaluation loss, at step 8"] == f"{measured[-1]['eval_loss']:.4f}"


def test_a_card_tells_the_mix_the_base_and_the_versions_where_they_are_recorded(run: Path) -> None:
    record = {
        "base_model": "01-ai/Yi-VL-6B",
        "sources": [
            {"source": "/data/gqa.json", "rows": 50000, "rows_per_epoch": 25000, "images": 24000},
            {"source": "/data/laion/{00000..00099}.tar", "shards": 100, "weight": 3.0},
        ],
        "versions": {"yivl": "1.0", "torch": "2.10"},
    }
    (run / "full" / RECORD).write_text(json.dumps(record))
    card = make_card(run / "full")
    assert "| `gqa.json` | 50,000 | 25,000 | 24,000 |  |  |" in card
    assert "| `{00000..00099}.tar` |  |  |  | 100 | 3.0 |" in card
    assert "Versions: torch 2.10, yivl 1.0." in card
    assert rows_of(card)["initialized from"] == "01-ai/Yi-VL-6B"
    assert "Not recorded: " not in card
    assert "/data" not in card
    data = ModelCard(card).data
    assert (data.base_model, data["base_model_relation"]) == ("01-ai/Yi-VL-6B", "finetune")
    assert ModelCard(make_card(run / "full", base_model="someone/else")).data.base_model == "someone/else"
    with pytest.raises(CheckpointError, match="base_model='/data/model': not a hub id"):
        make_card(run / "full", base_model="/data/model")


def scores_file(path: Path, images: str = "own", data: str = "/home/someone/exam.json") -> Path:
    scores = [
        {"group": ["count|en"], "number": 200, "accuracy": 99.54, "constant": 20.0},
        {"group": ["sign", "zh"], "number": 1200, "accuracy": 100 / 3, "constant": 4.0},
    ]
    about = {"data": data, "model": "/home/tiny-yi-vl", "images": images, "group_by": ["kind", "language"]}
    path.write_text(json.dumps(about | {"scores": scores}))
    return path


def test_scores_are_told_as_measured_and_controls_are_no_claims(tmp_path: Path, folder: Path) -> None:
    own, none = scores_file(tmp_path / "own.json"), scores_file(tmp_path / "none.json", "none")
    card = make_card(folder, repo_id=REPO, scores=[own, none])
    data = ModelCard(card).data
    assert data.model_name == "tiny-yi-vl"
    assert [(result.metric_value, result.dataset_name) for result in data.eval_results or ()] == [
        (99.54, "exam.json"),
        (100 / 3, "exam.json"),
    ]
    assert card.count("| kind, language | exact % | best constant answer % | questions |") == 2
    assert card.count("| sign, zh | 33.3 | 4.0 | 1,200 |") == 2
    assert "| count\\|en | 99.5 | 20.0 | 200 |" in card
    assert "`exam.json`, shown no image, measured on `tiny-yi-vl`:" in card
    assert "/home" not in card
    assert ModelCard(make_card(folder, scores=[none])).data.eval_results is None
    (tmp_path / "bad.json").write_text('{"scores": 3}')
    with pytest.raises(CheckpointError, match=r"bad\.json: not a scores\.json"):
        make_card(folder, scores=[tmp_path / "bad.json"])


def test_scores_of_a_benchmark_are_told_by_domain(tmp_path: Path, folder: Path) -> None:
    scores = {"benchmark": "mmmu", "data": "MMMU/MMMU", "split": "validation", "protocol": "yi", "model": "out/model"}
    scores |= {"questions": 900, "is_whole": True}
    scores |= {"subjects": {"Art": {"num": 30, "acc": 0.5}}, "domains": {"Art and Design": 0.5}, "overall": 0.459}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    card = make_card(folder, scores=[tmp_path / "scores.json"])
    assert "MMMU, validation split, 900 questions, protocol yi, measured on `model`:" in card
    assert "| Art and Design | 50.0 |\n| all | 45.9 |" in card
    [_, result] = ModelCard(card).data.eval_results or ()
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 45.9, "MMMU/MMMU")
    for change in ({"model": "out/another"}, {"is_whole": False}):  # told, but no claim
        (tmp_path / "scores.json").write_text(json.dumps(scores | change))
        card = make_card(folder, scores=[tmp_path / "scores.json"])
        assert "| all | 45.9 |" in card
        assert ModelCard(card).data.eval_results is None


def test_the_license_is_that_of_the_folder_or_the_given_one_and_never_made_up(folder: Path) -> None:
    def license_of(**given: Any) -> str | None:
        (folder / "README.md").write_text(make_card(folder, **given), encoding="utf-8")
        return ModelCard.load(folder / "README.md").data.license

    assert license_of() is None
    assert "Not recorded in this folder." in (folder / "README.md").read_text(encoding="utf-8")
    assert license_of(license_id="mit") == "mit"
    assert license_of() == "mit"  # of the card that was there
    assert license_of(license_id="apache-2.0") == "apache-2.0"
    (folder / "LICENSE").write_text("Some license, with terms.")
    assert license_of() == "other"
    assert ModelCard.load(folder / "README.md").data.license_link == "LICENSE"
    with pytest.raises(CheckpointError, match=r"LICENSE: is another license than 'apache-2.0'"):
        license_of(license_id="apache-2.0")
    shutil.copy(ROOT / "LICENSE", folder)
    assert license_of() == "apache-2.0"
    (folder / "LICENSE").unlink()
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its front matter is not valid YAML"):
        license_of()


def test_a_card_of_a_bare_checkpoint_says_that_training_is_not_recorded(folder: Path) -> None:
    card = make_card(folder)
    data = ModelCard(card).data
    assert (data.pipeline_tag, data.language, data.library_name) == ("image-text-to-text", ["en", "zh"], "yivl")
    assert data.base_model is None
    assert "## Training\n\nNot recorded in this folder." in card
    assert "Its ViT, of width 48, reads 56 × 56 pixels, a two-layer projector turns them into 16 image tokens" in card
    assert "--model-path model " in card
