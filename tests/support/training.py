"""Small datasets and small runs for the tests of training."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from support.golden import CHECKPOINT, GOLDEN, ROOT
from yivl.model.modeling import YiVLForCausalLM
from yivl.train.__main__ import main
from yivl.train.run_log import read_log

IMAGES = GOLDEN / "images"
VIT = CHECKPOINT / "vit/clip-vit-tiny-random-yi-vl-56"

# The first four answers follow from the image alone. The others are text-only, in both languages.
QUESTION, QUESTION_ZH = "What is in the picture?", "图里有什么？"
FACTS = [
    ("photo_rgb.jpg", QUESTION, "A photo."),
    ("square_rgb.png", QUESTION, "A boat on a lake."),
    ("tall_rgb.png", QUESTION_ZH, "一只兔子。"),
    ("wide_rgb.png", QUESTION_ZH, "三只猫。"),
    (None, "Who are you?", "I am Yi."),
    (None, "你是谁？", "我是人工智能。"),
    (None, "Say one.", "one"),
    (None, "Say two.", "two two"),
]


def conversation(image: str | None, question: str, answer: str, role: str = "gpt") -> dict[str, Any]:
    slot = "<image_placeholder>\n" if image else ""
    turns = [{"from": "human", "value": slot + question}, {"from": role, "value": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write rows as JSON, `FACTS` by default."""
    rows = [conversation(*fact) for fact in FACTS] if rows is None else rows
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_shards(folder: Path, num_shards: int = 3, per_shard: int = 7, *, bad: Sequence[int] = ()) -> str:
    """Write tar shards as img2dataset does and return their pattern; the images of ``bad`` samples are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(per_shard):
                data = io.BytesIO()
                Image.new("RGB", (20, 10 + place), (number * 7 % 256, 90, 30)).save(data, "PNG")
                files = {
                    "png": b"damaged" if number in bad else data.getvalue(),
                    "txt": f"caption {number}".encode(),
                    "json": json.dumps({"caption": f"caption {number}", "status": "success"}).encode(),
                }
                for suffix, content in files.items():
                    entry = tarfile.TarInfo(f"{shard:05d}{place:04d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                number += 1
    return str(folder / f"{{00000..{num_shards - 1:05d}}}.tar")


def write_language_model(folder: Path, model: YiVLForCausalLM) -> Path:
    """Write the language model of a Yi-VL as a Llama folder, such as that of Yi-6B-Chat."""
    folder.mkdir(parents=True)
    fields = json.loads((CHECKPOINT / "config.json").read_text())
    plain = {key: value for key, value in fields.items() if not key.startswith(("mm_", "image_", "vision"))}
    plain |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(plain))
    for path in CHECKPOINT.glob("*token*"):
        shutil.copy(path, folder)
    weights = {
        key: value.contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(("model.vision_tower.", "model.mm_projector."))
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flags(output_dir: Path, data: Path | str, **changes: Any) -> list[str]:
    """Return the flags of a small run: two epochs of four steps, eight samples."""
    values = {
        "model_name_or_path": CHECKPOINT,
        "data_path": data,
        "image_folder": IMAGES,
        "output_dir": output_dir,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "dataloader_num_workers": 0,
        "report_to": "none",
    } | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def train(output_dir: Path, data: Path | str, **changes: Any) -> list[dict[str, Any]]:
    """Train in this process and return the lines of log.jsonl."""
    main(flags(output_dir, data, **changes))
    return read_log(output_dir / "log.jsonl")


def losses(log: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["loss"] for line in log if "loss" in line]


def weights(folder: Path) -> dict[str, Any]:
    """Return all tensors of a folder."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def run_script(name: str, *arguments: Any, timeout: float = 500, **environment: Any) -> str:
    """Run a script of ``scripts/`` with the Python of the tests and return its output."""
    result = subprocess.run(
        [f"scripts/{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "GPUS": "0"}
        | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[-3500:]}"
    return result.stdout + result.stderr


def script_flags(model: Path, data: Path | str, out: Path, **changes: Any) -> list[str]:
    """Return the flags of a script of training."""
    values = {"model_name_or_path": model, "data_path": data, "image_folder": IMAGES, "output_dir": out}
    values |= {"dataloader_num_workers": 0} | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]
