"""Downloads of checkpoints, language models and ViTs: the files that are needed, and the errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from support.golden import CHECKPOINT, ROOT
from support.hub import Hub, Repository, sha_of
from support.models import OPEN_CLIP_VISION, VIT
from support.training import flags, train, write_language_model, write_rows, write_shards
from transformers import CLIPConfig, CLIPModel

from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.loading import LoadedModel, load_model, load_processors
from yivl.checkpoint.vit_source import resolve_vit
from yivl.errors import CheckpointError
from yivl.export.hf import to_hf
from yivl.train.__main__ import main

REPO = "someone/model"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PUBLISHED = ROOT / "tests/golden/yi-vl-34b"
# Its preprocessor_config.json: sizes are numbers, as old versions of transformers wrote them.
PREPROCESSING = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 56,
}


def as_json(fields: object) -> bytes:
    return json.dumps(fields).encode()


def serve(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    hub.repositories[name] = Repository(False, [{".gitattributes": b"", **files}])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_bytes(weights: dict[str, torch.Tensor], path: Path) -> bytes:
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata={"format": "pt"})
    return path.read_bytes()


SHARDS = {"model.safetensors.index.json": as_json({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}})}
OTHER_FORMAT = {
    "pytorch_model.bin.index.json": as_json({"metadata": {}, "weight_map": {"a": "pytorch_model-1.bin"}}),
    "pytorch_model-1.bin": b"the same weights",
    "consolidated.safetensors": b"the same weights",
    "figure.png": b"",
    "README.md": b"",
}
TOKENIZER = {"config.json": b"{}", "tokenizer.model": b"tokens", "LICENSE": b"terms"}


@pytest.mark.parametrize(
    ("needed", "others"),
    [
        pytest.param({**TOKENIZER, **SHARDS, "model-1.safetensors": b"a"}, OTHER_FORMAT, id="shards"),
        pytest.param({**TOKENIZER, "model.safetensors": b"a"}, {"pytorch_model.bin": b"a"}, id="one file"),
        pytest.param({**TOKENIZER, "model.safetensors": b"a"}, OTHER_FORMAT, id="one file and .bin shards"),
        pytest.param({**TOKENIZER, **SHARDS, "model.safetensors": b"a"}, {"model-1.safetensors": b"a"}, id="both"),
        pytest.param({**TOKENIZER, "pytorch_model.bin": b"a"}, {"optimizer.pt": b""}, id="one .bin file"),
        pytest.param(
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "non_lora_trainables.bin": b"b"},
            {"adapter_model.bin": b"a", "log.jsonl": b""},
            id="adapter",
        ),
        pytest.param(
            contents(CHECKPOINT),
            {f"{VIT}/open_clip_pytorch_model.bin": b"", f"{VIT}/open_clip_config.json": b"", "assets/a.png": b""},
            id="Yi-VL",
        ),
    ],
)
def test_only_files_that_a_load_reads_are_downloaded_and_only_once(
    needed: dict[str, bytes],
    others: dict[str, bytes],
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve(hub, REPO, {**needed, **others})
    folder = resolve_checkpoint(REPO)
    indexes = {name: data for name, data in others.items() if name.endswith(".bin.index.json")}
    assert contents(folder) == needed | indexes
    assert folder.name == sha_of(hub.repositories[REPO])
    assert not caplog.records
    hub.got.clear()
    assert resolve_checkpoint(REPO) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint(REPO) == folder
    assert not hub.got


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b'{"weight_map": {', "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"weight_map": {"a": 3}}', "weight_map is .*; expected an object, each value text"),
    ],
)
def test_a_damaged_index_is_one_line(index: bytes, said: str, hub: Hub) -> None:
    serve(hub, REPO, {**TOKENIZER, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match=f"/model.safetensors.index.json: {said}"):
        resolve_checkpoint(REPO)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(REPO) == Path(REPO)


def test_an_id_that_does_not_exist_is_one_line(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"^someone/nothing: no such folder, .* hub id such as 01-ai/Yi-VL-6B \("):
        resolve_checkpoint("someone/nothing")
    with pytest.raises(
        CheckpointError, match=rf"^someone/nothing: .*; give a ViT folder, a hub id such as {LAION}, or"
    ):
        resolve_vit("someone/nothing")


# ModelScope. The function has the parameters of modelscope 1.40 and copies files instead of downloading them.

MODELSCOPE = """
import shutil
from fnmatch import fnmatch
from pathlib import Path


def snapshot_download(
    model_id=None, revision=None, cache_dir=None, user_agent=None, local_files_only=False, cookies=None,
    ignore_file_pattern=None, allow_file_pattern=None, local_dir=None, allow_patterns=None, ignore_patterns=None,
    max_workers=None, repo_id=None, repo_type=None, progress_callbacks=None, token=None, endpoint=None,
):
    here = Path(__file__).parent
    source, target = here / "served" / model_id, here / "cache" / model_id
    if not source.is_dir():
        raise ValueError(f"{model_id} does not exist\\nrequest id 7")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        chosen = any(fnmatch(name, one) for one in allow_patterns)
        if path.is_file() and chosen and not any(fnmatch(name, one) for one in ignore_patterns or ()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return str(target)
"""


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``modelscope`` and the folder of the models it serves."""
    package = tmp_path / "site/modelscope"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(MODELSCOPE)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    return package / "served"


def test_a_model_of_modelscope_is_downloaded_and_loaded(modelscope: Path) -> None:
    served = Path(shutil.copytree(CHECKPOINT, modelscope / "01ai/Yi-VL-6B"))
    (served / VIT / "open_clip_pytorch_model.bin").write_bytes(b"a second ViT that no load reads")
    loaded = load_model("modelscope:01ai/Yi-VL-6B", device="cpu")
    assert loaded.name == "Yi-VL-6B"
    assert contents(modelscope.parent / "cache/01ai/Yi-VL-6B") == contents(CHECKPOINT)
    with pytest.raises(
        CheckpointError,
        match=r"^modelscope:01ai/Yi-VL-7B: could not be .*\(ValueError: 01ai/Yi-VL-7B does not exist\)$",
    ):
        load_model("modelscope:01ai/Yi-VL-7B")


def test_a_missing_modelscope_package_is_one_line_that_installs_it() -> None:
    result = subprocess.run(
        [sys.executable, "single_inference.py", "--model-path", "modelscope:01ai/Yi-VL-6B", "--question", "q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: modelscope:01ai/Yi-VL-6B: the modelscope package is not installed; pip install modelscope\n",
        result.stderr,
    )


# ViTs.


def clip_files(folder: Path) -> tuple[CLIPModel, dict[str, bytes]]:
    """Return a small CLIP with both towers and its files as in the repositories of LAION."""
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 99}, vision_config=vision, projection_dim=16))
    clip.save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return clip, files | {"preprocessor_config.json": as_json(PREPROCESSING)}


def open_clip_files(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """Return the weights and the files of a small open_clip model."""
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": text}
    weights = open_clip.CLIP(**config).state_dict()
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}}
    files = {"open_clip_config.json": as_json(about)}
    return weights, files | {"open_clip_model.safetensors": weights_bytes(weights, folder / "weights.safetensors")}


def test_a_vit_of_a_hub_id_is_that_of_its_transformers_files(hub: Hub, tmp_path: Path) -> None:
    clip, needed = clip_files(tmp_path / "clip")
    _, others = open_clip_files(tmp_path)
    others.pop("open_clip_config.json")
    serve(hub, LAION, {**needed, **others, "pytorch_model.bin": b"", "vocab.json": b"{}"})
    vit = resolve_vit(LAION)
    assert contents(vit.path) == needed
    assert vit.name == "CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert (vit.config.hidden_size, vit.config.image_size) == (48, 56)
    assert vit.clip_processor.crop_size["height"] == 56
    expected = clip.vision_model.state_dict()
    weights = vit.read_weights()
    assert weights.keys() == {key for key in expected if not key.endswith("position_ids")}
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


@pytest.mark.parametrize("config", [{}, {"config.json": as_json({"architecture": "vit_huge_patch14_clip_224"})}])
def test_a_vit_of_a_hub_id_with_open_clip_files_alone(config: dict[str, bytes], hub: Hub, tmp_path: Path) -> None:
    weights, needed = open_clip_files(tmp_path)
    serve(hub, REPO, {**needed, **config, "open_clip_pytorch_model.bin": b"", "model.safetensors": b"of timm"})
    vit = resolve_vit(REPO)
    assert contents(vit.path) == needed | config
    assert (vit.config.hidden_size, vit.config.num_attention_heads) == (160, 2)
    assert vit.clip_processor.image_mean == (0.5, 0.4, 0.3)
    assert vit.clip_processor.image_std == (0.1, 0.2, 0.3)
    assert torch.equal(vit.read_weights()["embeddings.patch_embedding.weight"], weights["visual.conv1.weight"])


def test_a_pretrained_tag_is_downloaded_by_open_clip(hub: Hub) -> None:
    """Its registry names the repository; the weights here are not of that model, which is too large for a test."""
    serve(hub, LAION, {"open_clip_model.safetensors": b"weights", "model.safetensors": b""})
    vit = resolve_vit("open_clip:ViT-H-14/laion2b_s32b_b79k")
    assert hub.got == {"open_clip_model.safetensors": 1}
    assert vit.path.read_bytes() == b"weights"
    assert vit.name == "ViT-H-14-laion2b_s32b_b79k"
    published = json.loads(next(PUBLISHED.glob("vit/*/config.json")).read_text(encoding="utf-8"))
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"):
        assert getattr(vit.config, name) == published[name]
    assert vit.clip_processor.image_mean == open_clip.OPENAI_DATASET_MEAN
    serve(hub, "timm/vit_base_patch32_clip_224.openai", {"open_clip_model.safetensors": b""})
    assert resolve_vit("open_clip:ViT-B-32/openai").config.hidden_act == "quick_gelu"


def test_weights_that_open_clip_cannot_download_are_one_line(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"^open_clip:ViT-H-14/laion2b_s32b_b79k: open_clip could not download"):
        resolve_vit("open_clip:ViT-H-14/laion2b_s32b_b79k")


def test_a_checkpoint_of_an_open_clip_training_run(tmp_path: Path) -> None:
    visual = open_clip.create_model("ViT-S-32").visual.state_dict()
    path = tmp_path / "epoch_3.pt"
    run = {f"module.visual.{key}": value for key, value in visual.items()} | {"module.logit_scale": torch.ones(())}
    torch.save({"epoch": 3, "name": "run", "state_dict": run, "optimizer": {}}, path)
    vit = resolve_vit(f"open_clip:ViT-S-32/{path}")
    assert (vit.name, vit.config.hidden_size, vit.config.image_size) == ("ViT-S-32-epoch_3", 384, 224)
    assert torch.equal(vit.read_weights()["post_layernorm.bias"], visual["ln_post.bias"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-H-15/laion2b_s32b_b79k", "open_clip has no model 'ViT-H-15'"),
        ("open_clip:ViT-H-14", "no pretrained tag of ViT-H-14 and no file; its tags: laion2b_s32b_b79k"),
        ("open_clip:ViT-H-14/laion", "no pretrained tag of ViT-H-14 and no file; its tags: laion2b_s32b_b79k"),
        ("open_clip:RN50/openai", "not the configuration of an open_clip ViT .*ResNet"),
        ("open_clip:ViT-B-16-SigLIP/webli", "not the configuration of an open_clip ViT .*width"),
    ],
)
def test_a_wrong_name_of_open_clip_is_one_line(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: {message}"):
        resolve_vit(name)


# Stage 1 from ids.


@pytest.mark.parametrize("form", ["transformers", "open_clip", "open_clip checkpoint"])
def test_stage_1_starts_from_hub_ids(form: str, hub: Hub, tmp_path: Path, loaded: LoadedModel) -> None:
    serve(hub, "01-ai/Yi-6B-Chat", contents(write_language_model(tmp_path / "llm", loaded.model)))
    name, side = LAION, 56
    if form == "transformers":
        serve(hub, LAION, clip_files(tmp_path / "clip")[1])
    elif form == "open_clip":
        serve(hub, LAION, open_clip_files(tmp_path)[1])
    else:
        torch.save(open_clip.create_model("ViT-S-32").state_dict(), tmp_path / "small.pt")
        name, side = f"open_clip:ViT-S-32/{tmp_path}/small.pt", 64
    out = tmp_path / "out"
    shards = write_shards(tmp_path / "shards", 1, 4)
    ids = {"model_name_or_path": "01-ai/Yi-6B-Chat", "vision_tower": name, "stage": 1, "image_size": side}
    train(out, shards, **ids, num_train_epochs=None, max_steps=1, global_batch_size=2)
    [vit] = (out / "vit").iterdir()
    assert vit.name == ("ViT-S-32-small" if "checkpoint" in form else LAION.rpartition("/")[2])
    trained, initial = load_model(out, device="cpu"), resolve_vit(name)
    assert trained.image_processor.image_size == side
    assert trained.image_processor.clip_processor.image_mean == initial.clip_processor.image_mean
    assert trained.model.config.vision_config.num_hidden_layers == initial.config.num_hidden_layers
    weights = trained.model.get_vision_tower().vit.state_dict()
    before = initial.read_weights()["embeddings.patch_embedding.weight"]
    torch.testing.assert_close(weights["embeddings.patch_embedding.weight"], before, atol=1e-3, rtol=0)


# Weights that are not read are not downloaded.


def got_weights(hub: Hub) -> set[str]:
    return {name for name in hub.got if name.endswith((".safetensors", ".bin"))}


@pytest.mark.parametrize("form", ["Yi-VL", "-hf", "-hf without its mark", "adapter"])
def test_processors_are_loaded_without_downloading_weights(form: str, hub: Hub, tmp_path: Path) -> None:
    folder = CHECKPOINT
    if form.startswith("-hf"):
        folder = tmp_path / "hf"
        to_hf(CHECKPOINT, folder)
        if form != "-hf":
            fields = json.loads((folder / "config.json").read_text())
            del fields["is_yi_vl_derived_model"]
            (folder / "config.json").write_bytes(as_json(fields))
    serve(hub, "01-ai/Yi-VL-6B", contents(folder))
    name = "01-ai/Yi-VL-6B"
    if form == "adapter":
        name = REPO
        config = {"base_model_name_or_path": "01-ai/Yi-VL-6B"}
        serve(hub, REPO, {"adapter_config.json": as_json(config), "adapter_model.safetensors": b"a"})
    config, _, processor = load_processors(name)
    assert (config.mm_projector_type, processor.image_size) == ("mlp2x_gelu_Norm", 56)
    # Only the keys of its weights tell that a LLaVA without the mark is a Yi-VL.
    assert bool(got_weights(hub)) == (form == "-hf without its mark")


def test_a_dry_run_downloads_no_weights(hub: Hub, tmp_path: Path, loaded: LoadedModel) -> None:
    serve(hub, "01-ai/Yi-VL-6B", contents(CHECKPOINT))
    serve(hub, "01-ai/Yi-6B-Chat", contents(write_language_model(tmp_path / "llm", loaded.model)))
    serve(hub, LAION, clip_files(tmp_path / "clip")[1])
    rows = write_rows(tmp_path / "rows.json")
    main(flags(tmp_path / "out", rows, model_name_or_path="01-ai/Yi-VL-6B", dry_run=True))
    main(flags(tmp_path / "out", rows, model_name_or_path="01-ai/Yi-6B-Chat", vision_tower=LAION, dry_run=True))
    assert hub.got["config.json"] >= 3
    assert not got_weights(hub)


def test_flags_that_do_not_fit_the_checkpoint_are_named_together_before_weights_are_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    """``scripts/v1_5/finetune.sh`` of LLaVA has both."""
    other = "openai/clip-vit-large-patch14-336"
    serve(hub, "01-ai/Yi-VL-6B", contents(CHECKPOINT))
    serve(hub, other, clip_files(tmp_path / "clip")[1])
    rows, changes = write_rows(tmp_path / "rows.json"), {"mm_projector_type": "mlp2x_gelu", "vision_tower": other}
    with pytest.raises(
        CheckpointError,
        match=rf"^--mm_projector_type mlp2x_gelu, --vision_tower {other}: \S+ has another projector or ViT; drop them",
    ):
        main(flags(tmp_path / "out", rows, model_name_or_path="01-ai/Yi-VL-6B", **changes))
    changes["vision_tower"] = "someone/nothing"
    with pytest.raises(
        CheckpointError, match=r"^--mm_projector_type .*; --vision_tower someone/nothing: no such folder"
    ):
        main(flags(tmp_path / "out", rows, model_name_or_path="01-ai/Yi-VL-6B", **changes))
    assert not got_weights(hub)
