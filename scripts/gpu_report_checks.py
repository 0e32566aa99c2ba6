"""First parts of the GPU report: the machine and its rates, and whether a GPU computes what the reference does.

python scripts/gpu_report_checks.py --part golden --device cuda
"""

import contextlib
import importlib.util
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_report_parts import Figures, Part, run_part

from yivl import command_line

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "flash_attn", "triton"),
    *("datasets", "open_clip", "fastapi", "uvicorn", "psutil", "pytest"),
)
"""Packages on which parts of the report depend, by the names of their modules."""
TOLERANCE = 1e-4
"""Absolute and relative tolerance of the golden vectors. Source: tests/model/test_golden_model.py."""


def environment(figures: Figures) -> None:
    """Measure the rates of the machine and list the versions of its packages."""
    import torch
    from benchmark_inference import machine, machine_rates

    device, repeats, size = figures.device, *((1, 1024) if figures.rehearsal else (5, None))
    figures.add("machine", lambda: machine(device) | (gpu_facts() if device == "cuda" else {}))
    figures.add("packages", lambda: versions(PACKAGES))
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)

        def rates(dtype: Any = dtype) -> dict[str, float]:
            bandwidth, products = machine_rates(dtype, device, repeats, size)
            return {"memory_bytes_per_s": bandwidth, "matrix_products_flop_per_s": products}

        figures.add(f"rates_{name}", rates)


def gpu_facts() -> dict[str, Any]:
    """Return memory, driver, CUDA and compute capability of the GPU."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    return {
        "gpus": torch.cuda.device_count(),
        "gpu_bytes": properties.total_memory,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Return the version of each module, or ``missing``."""
    distributions = metadata.packages_distributions()
    return {
        name: metadata.version(distributions[name][0]) if name in distributions else "missing"
        for name in modules
        if importlib.util.find_spec(name) is None or name in distributions
    }


def golden(figures: Figures) -> None:
    """Compare with the golden vectors: in float32 without TF32, with PyTorch's defaults, and in bfloat16."""
    import torch

    sys.path.append(str(ROOT / "tests"))
    pairs = 2 if figures.rehearsal else None
    figures.add("float32_as_loaded", lambda: compare_with_golden(figures.device, "float32", pairs))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    figures.add("float32_without_tf32", lambda: compare_with_golden(figures.device, "float32", pairs))
    figures.add("bfloat16", lambda: compare_with_golden(figures.device, "bfloat16", pairs))


def compare_with_golden(device: str, dtype: str, num_pairs: int | None) -> dict[str, Any]:
    """Return the largest error of features and logits over the tolerance, and the shares of equal tokens.

    ``equal_tokens`` compares the most likely token after every recorded position, ``equal_answers`` greedy answers.
    """
    import torch
    from support.golden import CHECKPOINT, golden_arrays, golden_json

    from yivl.checkpoint.loading import load_model

    def over_tolerance(found: torch.Tensor, wanted: torch.Tensor) -> float:
        error = (found.float().cpu() - wanted).abs()
        return float((error / (TOLERANCE + TOLERANCE * wanted.abs())).max())

    recorded, features, arrays = golden_json("generation"), golden_arrays("features"), golden_arrays("logits")
    model = load_model(CHECKPOINT, device=device, dtype=dtype).model  # type: ignore[arg-type]
    worst = {"vision_features": 0.0, "projected": 0.0, "logits": 0.0}
    difference, equal, positions, answers = 0.0, 0, 0, []
    pairs = recorded["pairs"][:num_pairs]
    for pair in pairs:
        name, ids = pair["id"], torch.tensor([pair["input_ids"]], device=device)
        images = None
        if -200 in pair["input_ids"]:
            images = features[f"{name}__pixel_values"][None].to(device, model.dtype)
        with torch.inference_mode():
            if images is not None:
                found = {"vision_features": model.get_vision_tower()(images), "projected": model.encode_images(images)}
                for kind, value in found.items():
                    worst[kind] = max(worst[kind], over_tolerance(value[0], features[f"{name}__{kind}"]))
            logits = model(ids, images=images).logits[0]
            answer = model.generate(ids, images=images, do_sample=False, max_new_tokens=32)
        kept, wanted = logits[pair["logits_start"] :], arrays[f"{name}__logits"]
        worst["logits"] = max(worst["logits"], over_tolerance(kept, wanted))
        difference = max(difference, float((kept.float().cpu() - wanted).abs().max()))
        tokens = arrays[f"{name}__argmax"]
        equal, positions = equal + int((logits.argmax(-1).cpu() == tokens).sum()), positions + len(tokens)
        answers.append(answer[0, ids.shape[1] :].tolist() == pair["no_stop"]["ids"])
    return {
        "error_over_tolerance": worst,
        "largest_logit_difference": difference,
        "equal_tokens": equal / positions,
        "equal_answers": sum(answers) / len(answers),
        "prompts": len(pairs),
    }


def small_model(figures: Figures) -> None:
    """Compare greedy answers of the trained small model with those of the CPU in float32, one by one and in a batch."""
    from benchmark_quantization import examination

    from yivl.checkpoint.loading import load_model
    from yivl.command_line import EMBEDDED_MODEL
    from yivl.inference.chat import Chat, answer_batch

    asked = examination(1 if figures.rehearsal else 3)
    asked = asked[::10] if figures.rehearsal else asked
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 64}

    def ask(device: str, dtype: Any) -> list[str]:
        loaded = load_model(EMBEDDED_MODEL, device=device, dtype=dtype)
        return [Chat(loaded).ask(question, image, **settings) for question, image in asked]

    expected = ask("cpu", "float32")

    def share(found: list[str]) -> dict[str, Any]:
        return {"equal_answers": sum(map(str.__eq__, found, expected)) / len(expected), "questions": len(expected)}

    def batch() -> dict[str, Any]:
        loaded = load_model(EMBEDDED_MODEL, device=figures.device, dtype="float32")
        questions, images = zip(*asked, strict=True)
        return share(answer_batch(loaded, questions, images, **settings))

    figures.add("float32", lambda: share(ask(figures.device, "float32")))
    figures.add("bfloat16", lambda: share(ask(figures.device, "bfloat16")))
    figures.add("float32_batch", batch)


PARTS = (
    Part("environment", 20, "machine", environment),
    Part("golden", 30, "golden vectors of the reference implementation", golden),
    Part("small_model", 40, "answers of the trained small model against the CPU", small_model),
)

if __name__ == "__main__":
    command_line.run(lambda: run_part(PARTS, __doc__))
