"""Last parts of the GPU report: loading and quantized models, the API, a short training of the small model, the tests.

python scripts/gpu_report_programs.py --part serving --device cuda
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpu_report_inference import Setting, answer_figures
from gpu_report_parts import Figures, Part, free_memory, require_packages, run_part
from gpu_report_runner import MEMORY_FOLDER, kill_tree

from yivl import command_line

ROOT = Path(__file__).resolve().parents[1]
TRAINING_SECONDS = 120
"""Training of the small model."""


@contextmanager
def scratch_folder(num_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder, in memory if it has room for ``num_bytes`` twice."""
    memory = os.environ.get(MEMORY_FOLDER)
    has_room = memory is not None and shutil.disk_usage(memory).free > 2 * num_bytes
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)


def loading(figures: Figures) -> None:
    """Measure loading in 16, 8 and 4 bits, from a folder in memory where it has room, and one answer of each."""
    from benchmark_inference import peak_bytes
    from random_models import write_random_checkpoint

    from yivl.checkpoint.loading import load_model

    setting = Setting.of(figures)
    forms: dict[str, dict[str, Any]] = {
        "4_bits": {"load_in_4bit": True},
        "8_bits": {"load_in_8bit": True},
        "16_bits": {},
    }

    def measure(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
        if flags and setting.device == "cuda":
            require_packages("bitsandbytes")
        start = time.perf_counter()
        loaded = load_model(folder, device=setting.device, **flags)
        seconds, peak = time.perf_counter() - start, peak_bytes(setting.device)
        free_memory()
        return {"loading_seconds": seconds, "loading_peak_bytes": peak} | answer_figures(loaded, setting)

    with scratch_folder(14 * 10**9) as scratch:
        start = time.perf_counter()
        write_random_checkpoint(setting.shape, "bfloat16", scratch / "model", setting.device)
        figures.values["writing_seconds"] = time.perf_counter() - start
        figures.show()
        for name, flags in forms.items():
            figures.add(name, lambda flags=flags: measure(scratch / "model", flags))


def load_34b(figures: Figures) -> None:
    """Load the 34B shape in 4 bits from a file of zeros that takes no room, and answer once."""
    from benchmark_inference import peak_bytes
    from random_models import GOLDEN

    from yivl.checkpoint.loading import load_model
    from yivl.inference.chat import Chat

    if figures.device == "cuda":
        require_packages("bitsandbytes")

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            size = write_zeros("tiny" if figures.rehearsal else "34b", Path(folder))
            start = time.perf_counter()
            loaded = load_model(folder, device=figures.device, load_in_4bit=True)
            seconds = time.perf_counter() - start
        found = {"checkpoint_bytes": size, "loading_seconds": seconds, "loading_peak_bytes": peak_bytes(figures.device)}
        chat = Chat(loaded)
        chat.ask("What is in this image?", GOLDEN / "images/photo_rgb.jpg", temperature=0, max_new_tokens=8)
        assert chat.last_answer is not None
        return found | {"loads": 1, "new_tokens": chat.last_answer.new_tokens, "peak_bytes": peak_bytes(figures.device)}

    figures.add("4_bits", measure)


def write_zeros(shape: str, folder: Path) -> int:
    """Write a checkpoint of a shape in bfloat16 whose weights are holes in sparse files; return its size in bytes.

    A 34B has 69 GB of weights. Loading takes as long as with other weights, except for the disk.
    """
    from random_models import shape_config, small_files
    from safetensors import safe_open

    from yivl.checkpoint.atomic import write_json
    from yivl.checkpoint.format import TOWER
    from yivl.checkpoint.loading import empty_model

    config = shape_config(shape, "bfloat16")
    vit = folder / "vit" / config.vit_name
    vit.mkdir(parents=True)
    write_json(folder / "config.json", config.to_published_dict() | {"torch_dtype": "bfloat16"})
    write_json(vit / "config.json", config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]})
    tokenizer, processor = small_files(config)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(vit)
    shapes = {key: list(value.shape) for key, value in empty_model(config).state_dict().items()}
    tower = {key.removeprefix(TOWER): value for key, value in shapes.items() if key.startswith(TOWER)}
    for path, tensors in ((folder / "model.safetensors", shapes), (vit / "model.safetensors", tower)):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, dimensions in tensors.items():
            start, end = end, end + 2 * _product(dimensions)
            header[key] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(tensors)
    return (folder / "model.safetensors").stat().st_size


def _product(dimensions: list[int]) -> int:
    size = 1
    for dimension in dimensions:
        size *= dimension
    return size


def serving(figures: Figures) -> None:
    """Measure tokens per second of 1, 8 and 32 clients of the API, without images and with one each."""
    require_packages("fastapi", "uvicorn", "httpx")
    import torch
    from benchmark_serving import Client, new_image, throughput, unwanted_tokens
    from benchmark_serving import serving as serve

    from yivl.serve.limits import Limits

    setting = Setting.of(figures)
    loaded = setting.random_model()
    with torch.no_grad():
        loaded.model.lm_head.weight[unwanted_tokens(loaded.tokenizer)] = 0
    flags = Namespace(clients=max(setting.rows), prefill_chunk=Limits().prefill_chunk)
    with serve(loaded, flags) as url:
        client = Client(url, setting.new_tokens)
        client.ask("warm up")
        client.ask("warm up", new_image())
        repeats = 1 if figures.rehearsal else 2
        for with_image, kind in ((False, "text"), (True, "image")):
            for clients in setting.rows:

                def rate(clients: int = clients, with_image: bool = with_image) -> dict[str, float]:
                    rates = [throughput(client, clients, with_image=with_image) for _ in range(repeats)]
                    return {"tokens_per_s": statistics.median(rates)}

                figures.add(f"{kind}_{clients}_clients", rate)


def small_training(figures: Figures) -> None:
    """Train the small model with a random projector for two minutes, and score it before and after."""
    require_packages("datasets", "psutil", "matplotlib")
    import torch

    from yivl.checkpoint.loading import load_model
    from yivl.checkpoint.saving import save_checkpoint
    from yivl.command_line import EMBEDDED_MODEL
    from yivl.train.run_log import read_log

    rehearses = figures.rehearsal
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loaded = load_model(EMBEDDED_MODEL, device="cpu", dtype="float32")
        torch.manual_seed(0)
        for module in loaded.model.model.mm_projector.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
                module.reset_parameters()
        processor = loaded.image_processor.clip_processor
        save_checkpoint(loaded.model, folder / "start", tokenizer=loaded.tokenizer, image_processor=processor)
        del loaded
        number = 8 if rehearses else 8000
        world = ["-m", "yivl.tiny.world", "dialogues", "--number", str(number), "--first", "1000000"]
        subprocess.run([sys.executable, *world, "--output_dir", str(folder / "data")], check=True, stdout=sys.stderr)
        questions = 0 if rehearses else 10
        figures.add("before", lambda: score(folder / "start", figures.device, questions))
        seconds = train_for(folder, 0 if rehearses else TRAINING_SECONDS, figures)
        (trained,) = (folder / "out").glob("checkpoint-*")
        log = [line for line in read_log(folder / "out/log.jsonl") if "loss" in line]
        figures.values |= {"training_seconds": seconds, "steps": int(trained.name.partition("-")[2])}
        figures.values |= {"first_loss": log[0]["loss"], "last_loss": log[-1]["loss"]}
        figures.add("after", lambda: score(trained, figures.device, questions))


def train_for(folder: Path, seconds: float, figures: Figures) -> float:
    """Train until a time after the first step has passed, with the script of stage 3; return the seconds.

    SIGUSR1 saves a checkpoint after the current step and ends the run.

    Raises:
        TimeoutError: If there is no loss in half of the time that is left.
        RuntimeError: If there is no checkpoint in the end.
    """
    size = "4" if figures.rehearsal else "16"
    flags = (
        "--image_size 192 --num_train_epochs 1000 --learning_rate 3e-4 --lr_scheduler_type constant_with_warmup "
        "--warmup_steps 20 --gradient_checkpointing False --vision_gradient_checkpointing False "
        "--model_max_length 512 --save_strategy steps --save_steps 100000 --logging_steps 1 --max_grad_norm 1 "
        f"--dataloader_num_workers {0 if figures.rehearsal else 8} --global_batch_size {size} "
        f"--per_device_train_batch_size {size} --bf16 True --report_to none"
    )
    flags += " --use_cpu True" if figures.device == "cpu" else ""
    command = [str(ROOT / "scripts/train_stage3.sh"), *flags.split()]
    variables = {"MODEL": "start", "DATA": "data/rows.json", "IMAGES": "data", "OUT": "out"}
    environment = os.environ | {name: str(folder / path) for name, path in variables.items()}
    environment |= {"PYTHON": sys.executable, "DEEPSPEED": "", "GPUS": "1" if figures.device == "cuda" else "0"}
    log = folder / "out/log.jsonl"
    start = time.monotonic()
    first_loss = (figures.seconds_left - seconds) / 2
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (log.is_file() and '"loss"' in log.read_text(encoding="utf-8")):
                if time.monotonic() - start > first_loss:
                    raise TimeoutError(f"no loss after {first_loss:.0f} s: {_last_line(output)}")
                time.sleep(0.1)
            start = time.monotonic()
            while process.poll() is None and time.monotonic() - start < seconds:
                time.sleep(0.1)
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
            process.wait()
        finally:
            kill_tree(process)
        if not list((folder / "out").glob("checkpoint-*")):
            raise RuntimeError(f"exit code {process.returncode}: {_last_line(output)}")
    return time.monotonic() - start


def _last_line(output: IO[str]) -> str:
    """Copy a file to the log and return its last line."""
    output.seek(0)
    text = output.read()
    sys.stderr.write(text)
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def score(folder: Path, device: str, number: int) -> dict[str, Any]:
    """Return the share of exact answers about new scenes, ``number`` questions of each kind and language; 0 for one."""
    from yivl.checkpoint.loading import load_model
    from yivl.inference.chat import answer_batch
    from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
    from yivl.tiny.world.rendering import render
    from yivl.tiny.world.words import LANGUAGES

    loaded = load_model(folder, device=device, dtype="float32")
    right = total = 0
    kinds = [(kind, language) for kind in EVALUATED_KINDS for language in LANGUAGES]
    for kind, language in kinds if number else kinds[:1]:
        asked = list(balanced_questions("scenes", kind, language, number or 1))
        texts, images = [item.text for _, item in asked], [render(scene, 192).image for scene, _ in asked]
        answers = answer_batch(loaded, texts, images, temperature=0, max_new_tokens=64)
        right += sum(answer == item.answer for answer, (_, item) in zip(answers, asked, strict=True))
        total += len(asked)
    return {"exact_answers": right / total, "questions": total}


def gpu_tests(figures: Figures) -> None:
    """Run the tests that are marked ``gpu``; the figures are printed after every test."""
    require_packages("pytest")
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    # The options of the project need pytest-xdist.
    options = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(files))]
    counts: Counter[str] = Counter()
    failed: dict[str, Any] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            if match := re.match(r"(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
                counts[match[2].lower()] += 1
                if match[2] in ("FAILED", "ERROR"):
                    failed[match[1].rpartition("::")[2]] = {"error": match[2].lower()}
                figures.values["tests"] = dict(counts) | failed
                figures.show()
    if process.returncode not in (0, 1):  # 1: tests failed; others: it crashed, or found no tests
        raise RuntimeError(f"pytest: exit code {process.returncode}")


PARTS = (
    Part("serving", 90, "API, tokens per second of all clients", serving),
    Part("load_34b", 150, "34B shape, loaded in 4 bits", load_34b),
    Part("loading", 150, "loading and answers in 4, 8 and 16 bits", loading),
    Part("small_training", 200, "small model with a random projector, trained for two minutes", small_training),
    Part("gpu_tests", 220, "tests marked gpu", gpu_tests),
)

if __name__ == "__main__":
    command_line.run(lambda: run_part(PARTS, __doc__))
