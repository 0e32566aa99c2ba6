"""The formats that hostile files are made of: valid samples to mutate, and the entry point that opens them."""

import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hostile_mutations as mutations

ROOT: Final = Path(__file__).parent.parent
CHECKPOINT: Final = ROOT / "tests/golden/checkpoint"
INTERNVL: Final = ROOT / "tests/golden_internvl/checkpoint"
IMAGES: Final = ROOT / "tests/golden/images"
VIT: Final = "vit/clip-vit-tiny-random-yi-vl-56"

Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Format:
    """A format of files."""

    name: str
    sample: str
    """Name of the folder of valid files."""
    files: tuple[str, ...]
    """Those of them that are mutated."""
    mutate: Mutation
    open: Callable[[Path, Path], None]
    """Opens a folder with a mutated file by the entry point; the second path is for output."""
    share: int = 10
    """Of the campaign."""


def ask(folder: Path, _: Path, **options: Any) -> None:
    """Load a checkpoint and ask it a question with an image."""
    from yivl.checkpoint.loading import load_model
    from yivl.inference.chat import Chat

    loaded = load_model(folder, device="cpu", **options)
    Chat(loaded).ask("hi", IMAGES / "square_rgb.png", temperature=0, max_new_tokens=2)


def ask_adapter(folder: Path, output: Path) -> None:
    """Load an adapter on the valid checkpoint and ask it a question."""
    ask(folder, output, model_base=CHECKPOINT)


def convert(folder: Path, output: Path) -> None:
    """Convert a checkpoint to safetensors."""
    from yivl.checkpoint.conversion import bin_to_safetensors

    bin_to_safetensors(folder, output / "converted")


def check_hub(folder: Path, _: Path) -> None:
    """Check a folder as before an upload and after a download."""
    from yivl.checkpoint.hub import check_whole, known_base

    check_whole(folder)
    known_base(folder)


def initialize(folder: Path, output: Path) -> None:
    """Read a ViT for a run that starts from a language model."""
    from yivl.checkpoint.vit_source import resolve_vit

    resolve_vit(os.fspath(folder)).read_weights()


def plan_run(folder: Path, output: Path) -> None:
    """Plan a training run without training."""
    train(output, {"config": folder / "run.yaml", "dry_run": True})


def check_data(folder: Path, output: Path) -> None:
    """Run the data check; that rows are invalid is its result."""
    from yivl.data import check

    [path] = folder.glob("data.*")
    sys.argv = ["check", str(path), "--image-folder", str(IMAGES), "--model-path", str(CHECKPOINT), "--workers", "0"]
    try:
        check.main()
    except SystemExit as end:
        if end.code != 1:
            raise


def train_on(folder: Path, output: Path) -> None:
    """Train two steps on rows, of which the invalid ones are skipped."""
    [path] = folder.glob("data.*")
    train(output / "run", {"data_path": path, "max_steps": 2, "on_bad_row": "skip"})


def read_image(folder: Path, _: Path) -> None:
    """Load and preprocess an image."""
    from yivl.checkpoint.loading import load_processors
    from yivl.image_processing import load_image

    [path] = folder.glob("image.*")
    load_processors(CHECKPOINT)[2]([load_image(path)])


def resume(folder: Path, output: Path) -> None:
    """Resume a run from a checkpoint."""
    shutil.copytree(folder, output / "run")
    train(output / "run", {"resume": "auto", **RUN})


def resume_unlisted(folder: Path, output: Path) -> None:
    """Resume a run from a checkpoint of an earlier version, which has no manifest; its readers see the damage."""
    shutil.copytree(folder, output / "run", ignore=shutil.ignore_patterns(_MANIFEST))
    train(output / "run", {"resume": "auto", **RUN})


RUN: Final = {"max_steps": 4, "save_steps": 2, "lora_enable": True}
"""Flags of the run whose checkpoint is mutated."""


def train(output: Path, changes: dict[str, Any]) -> None:
    """Run the training program in this process."""
    from yivl.train.__main__ import main

    flags = {
        "model_name_or_path": CHECKPOINT,
        "data_path": output.parent / "rows.json",
        "image_folder": IMAGES,
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "save_strategy": "steps" if "save_steps" in changes else "no",
    } | changes
    if not Path(flags["data_path"]).exists():
        write_rows(Path(flags["data_path"]))
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def rows() -> list[dict[str, Any]]:
    """Return valid rows with and without an image."""
    turns = [{"from": "human", "value": "<image_placeholder>\nWhat is this?"}, {"from": "gpt", "value": "A boat."}]
    text = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Yi."}]
    return [
        *({"image": name, "conversations": turns} for name in ("square_rgb.png", "photo_rgb.jpg")),
        *({"conversations": text}, {"conversations": text, "id": 3}),
    ]


def write_rows(path: Path) -> None:
    """Write valid rows as JSON or JSON lines."""
    lines = [json.dumps(row) for row in rows()]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")


def write_tar(path: Path) -> None:
    """Write a tar shard with captions and metadata."""
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            image = (IMAGES / "square_rgb.png").read_bytes()
            for suffix, content in (("png", image), ("txt", b"A boat."), ("json", b'{"caption": "A boat."}')):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def mutate_tar(data: bytes, draw: random.Random) -> bytes:
    """Return a tar shard with a hostile member, or with other bytes."""
    if draw.random() < 0.6:
        return mutations.mutate_bytes(data, draw)
    file = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=file, mode="w") as tar:
        for member in source:
            entry, content = tarfile.TarInfo(member.name), source.extractfile(member)
            body = content.read() if content else b""
            if member.name.startswith("00001"):
                match draw.randrange(5):
                    case 0:
                        entry.type, entry.linkname, body = tarfile.SYMTYPE, draw.choice(["nothing", member.name]), b""
                    case 1:
                        entry.type, entry.linkname, body = tarfile.LNKTYPE, draw.choice(["nothing", member.name]), b""
                    case 2:
                        entry.name = draw.choice(["../outside/a.txt", "/tmp/a.txt", "x" * 300, "no-suffix"])
                    case 3:
                        entry.type, body = draw.choice([tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]), b""
                    case _:
                        body = b"[" * mutations.DEEP
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return file.getvalue()


def write_samples(folder: Path) -> None:
    """Write the valid files of all formats below a folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig

    from yivl.checkpoint.adapters import save_adapter
    from yivl.checkpoint.loading import load_model
    from yivl.checkpoint.saving import save_checkpoint
    from yivl.export.hf import to_hf

    loaded = load_model(CHECKPOINT, device="cpu")
    processor = loaded.image_processor.clip_processor
    shutil.copytree(CHECKPOINT, folder / "bin")
    save_checkpoint(loaded.model, folder / "checkpoint", tokenizer=loaded.tokenizer, image_processor=processor)
    to_hf(CHECKPOINT, folder / "hf")
    shutil.copytree(INTERNVL, folder / "internvl")
    shutil.copytree(CHECKPOINT / VIT, folder / "vit")
    (folder / "open_clip").mkdir()
    vision = CLIPVisionConfig.from_pretrained(CHECKPOINT / VIT)
    fields = {"width": vision.hidden_size, "layers": 1, "head_width": 12, "image_size": 56, "patch_size": 14}
    config = {"model_cfg": {"vision_cfg": fields}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}
    (folder / "open_clip/open_clip_config.json").write_text(json.dumps(config))
    weights = {"visual.class_embedding": torch.zeros(48), "visual.ln_pre.weight": torch.zeros(48)}
    torch.save({"state_dict": weights}, folder / "open_clip/open_clip_pytorch_model.bin")
    for name in ("json", "jsonl"):
        (folder / f"rows-{name}").mkdir()
        write_rows(folder / f"rows-{name}" / f"data.{name}")
    (folder / "tar").mkdir()
    write_tar(folder / "tar/data.tar")
    (folder / "mixture").mkdir()
    write_rows(folder / "mixture/rows.json")
    (folder / "mixture/data.yaml").write_text("- name: a\n  data_path: rows.json\n  weight: 2\n  max_rows: 3\n")
    (folder / "config").mkdir()
    (folder / "config/run.yaml").write_text("learning_rate: 1e-5\nnum_train_epochs: 1\nlora_enable: true\nseed: 3\n")
    for name in ("photo_rgb.jpg", "rgba_square.png"):
        (folder / name).mkdir()
        shutil.copy(IMAGES / name, folder / name / f"image{Path(name).suffix}")
    train(folder / "run", RUN | {"max_steps": 2})
    for path in (folder / "run").iterdir():  # as if interrupted after the first checkpoint
        if path.is_file():
            path.unlink()
    (folder / "rows.json").unlink()
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    save_adapter(adapted, folder / "adapter", image_processor=loaded.image_processor)


_CONFIGS: Final = ("config.json", f"{VIT}/config.json", f"{VIT}/preprocessor_config.json", "generation_config.json")
_TOKENIZER: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OF_INTERNVL: Final = ("config.json", "preprocessor_config.json", *_TOKENIZER, "model.safetensors.index.json")
_CHECKPOINT: Final = "checkpoint-2"
_MANIFEST: Final = "checkpoint_manifest.json"

FORMATS: Final = (
    Format("configurations", "checkpoint", _CONFIGS, mutations.mutate_json, ask, 60),
    Format("tokenizer files", "checkpoint", _TOKENIZER, mutations.mutate_json, ask, 30),
    Format("tokenizer.model", "checkpoint", ("tokenizer.model",), mutations.mutate_bytes, ask, 15),
    Format("weight index", "bin", ("pytorch_model.bin.index.json",), mutations.mutate_json, ask, 20),
    Format("safetensors", "checkpoint", ("model.safetensors",), mutations.mutate_safetensors, ask, 25),
    Format(".bin weights", "bin", ("pytorch_model-00002-of-00002.bin",), mutations.mutate_pickle, ask, 25),
    Format("conversion", "bin", ("pytorch_model.bin.index.json",), mutations.mutate_json, convert, 8),
    Format("upload", "checkpoint", _CONFIGS, mutations.mutate_json, check_hub, 8),
    Format("-hf", "hf", ("config.json", "published.json"), mutations.mutate_json, ask, 25),
    Format("InternVL-Chat", "internvl", _OF_INTERNVL, mutations.mutate_json, ask, 40),
    Format("ViT", "vit", ("config.json", "preprocessor_config.json"), mutations.mutate_json, initialize, 12),
    Format("open_clip", "open_clip", ("open_clip_config.json",), mutations.mutate_json, initialize, 12),
    Format("open_clip .bin", "open_clip", ("open_clip_pytorch_model.bin",), mutations.mutate_pickle, initialize, 8),
    Format(
        "adapters",
        "adapter",
        ("adapter_config.json", "yivl_adapter_config.json"),
        mutations.mutate_json,
        ask_adapter,
        20,
    ),
    Format("adapter weights", "adapter", ("adapter_model.safetensors",), mutations.mutate_safetensors, ask_adapter, 8),
    Format("JSON rows", "rows-json", ("data.json",), mutations.mutate_json, check_data, 15),
    Format("JSON lines", "rows-jsonl", ("data.jsonl",), mutations.mutate_lines, check_data, 15),
    Format("training on JSON rows", "rows-json", ("data.json",), mutations.mutate_json, train_on, 8),
    Format("tar shards", "tar", ("data.tar",), mutate_tar, check_data, 20),
    Format("training on tar shards", "tar", ("data.tar",), mutate_tar, train_on, 8),
    Format("mixtures", "mixture", ("data.yaml",), mutations.mutate_yaml, check_data, 20),
    Format("run configurations", "config", ("run.yaml",), mutations.mutate_yaml, plan_run, 20),
    Format("JPEG", "photo_rgb.jpg", ("image.jpg",), mutations.mutate_bytes, read_image, 15),
    Format("PNG", "rgba_square.png", ("image.png",), mutations.mutate_bytes, read_image, 15),
    *(
        Format(f"{kind}, {name}", "run", (f"{_CHECKPOINT}/{name}",), mutate, open_run, share)
        for kind, open_run, share in (
            ("checkpoint of a run", resume, 2),
            ("checkpoint without manifest", resume_unlisted, 3),
        )
        for name, mutate in (
            ("trainer_state.json", mutations.mutate_json),
            ("training_arguments.json", mutations.mutate_json),
            ("training_run.json", mutations.mutate_json),
            ("optimizer.pt", mutations.mutate_bytes),
            ("scheduler.pt", mutations.mutate_bytes),
            ("rng_state.pth", mutations.mutate_bytes),
        )
    ),
    # Without a manifest, a changed weight is not noticed.
    Format(
        "checkpoint of a run, adapter_model.safetensors",
        "run",
        (f"{_CHECKPOINT}/adapter_model.safetensors",),
        mutations.mutate_safetensors,
        resume,
        2,
    ),
    Format("checkpoint of a run, manifest", "run", (f"{_CHECKPOINT}/{_MANIFEST}",), mutations.mutate_json, resume, 4),
)
