"""Measure loading, first token, decoding and a four-turn chat of a random model against their bounds.

python scripts/benchmark_inference.py --shape medium --dtype bfloat16

All figures are medians over --repeats in one run on one machine, so that ratios are comparable: against the bound
(bytes read per token / memory bandwidth, FLOPs of the prompt / matrix-product rate) and against a LLaVA baseline on
the same libraries: the whole ViT, logits of every prompt position, the default cache and kernels, and a chat that
re-computes its history and image every turn.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_report import chat_table, replace_section
from flops import language_flops, vision_flops
from random_models import GOLDEN, SHAPES, write_random_checkpoint

NEW_TOKENS = 32
QUESTIONS = ("What is in this image?", "What are they doing?", "What are they eating?", "Describe it in detail.")


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--markdown", type=Path, help="write chat and loading, or replace them in a page with a section"
    )
    parser.add_argument("--section", default="chat", help="name of the section (default: %(default)s)")
    # For the child process that loads and reports its memory.
    parser.add_argument("--load-only", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()
    if arguments.load_only:
        report_loading(arguments.load_only, arguments.device)
        return

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(arguments.shape, arguments.dtype, folder)
        results = {
            "machine": machine(arguments.device),
            "shape": arguments.shape,
            "dtype": arguments.dtype,
            "repeats": arguments.repeats,
            "loading_safetensors": measure_loading(folder, arguments.device),
            "loading_bin": measure_loading(with_bin_shards(folder), arguments.device),
            **measure_answers(folder, arguments),
        }
    print(json.dumps(rounded(results), indent=2))
    if arguments.markdown:
        replace_section(arguments.markdown, arguments.section, chat_table(results))


def machine(device: str) -> dict[str, Any]:
    """Return the hardware and the versions of the measurement."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads()}
    gpu = {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {}
    return facts | gpu | {"torch": torch.__version__, "python": platform.python_version()}


def with_bin_shards(folder: Path) -> Path:
    """Return a copy of a checkpoint with ``.bin`` shards, like the released checkpoints."""
    import torch
    from safetensors.torch import load_file

    target = folder.with_name("bin")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model-*", "model.safetensors.index.json"))
    for shard in folder.glob("model-*.safetensors"):
        torch.save(load_file(shard), target / f"pytorch_{shard.stem}.bin")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: f"pytorch_{Path(name).stem}.bin" for key, name in index["weight_map"].items()}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


def measure_loading(folder: Path, device: str) -> dict[str, Any]:
    """Load in a separate process, so that its peak memory is that of loading."""
    command = [sys.executable, __file__, "--load-only", str(folder), "--device", device]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size = sum(path.stat().st_size for path in folder.glob("*model-0*"))
    facts: dict[str, Any] = json.loads(output) | {"checkpoint_bytes": size}
    return facts | {"peak_over_checkpoint": facts["peak_bytes"] / size}


def report_loading(folder: Path, device: str) -> None:
    """Load; print the seconds and the increase of the peak resident set in bytes, mapped files included."""
    from yivl.checkpoint.loading import load_model

    before = resident_peak()
    start = time.perf_counter()
    load_model(folder, device=device)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": resident_peak() - before}))


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Return the median over ``repeats`` runs after a warm-up run."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_answers(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure first token, decoding and chat turns, the LLaVA baseline, and the rates of the machine."""
    from PIL import Image

    from yivl.checkpoint.loading import load_model

    loaded = load_model(folder, device=arguments.device)
    model, repeats, device = loaded.model, arguments.repeats, arguments.device
    photo = Image.open(GOLDEN / "images/photo_rgb.jpg")
    bandwidth, matmul_rate = machine_rates(model.dtype, device, repeats)

    chat = measure_chat(loaded, photo, repeats)
    answer = measure_answer(loaded, photo, repeats)
    bounds = compare_with_bounds(model, answer, bandwidth, matmul_rate)
    peak = peak_bytes(device)
    del loaded, model  # the baseline has a model of its own
    baseline = llava_baseline(LlavaBaseline(folder, device, arguments.dtype), photo, repeats)
    rate, ttft = answer["tokens_per_s"], answer["first_token_seconds"]
    bounds["first_token"] |= {
        "baseline_seconds": baseline["first_token"],
        "baseline_over_ours": baseline["first_token"] / ttft,
    }
    bounds["decode"] |= {
        "baseline_tokens_per_s": baseline["tokens_per_s"],
        "ours_over_baseline": rate / baseline["tokens_per_s"],
    }
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "matmul_flops_per_s": matmul_rate,
        "peak_bytes": peak,
        "prompt_tokens": answer["prompt_tokens"],
        **bounds,
        "chat": chat,
    }


def measure_answer(loaded: Any, photo: Any, repeats: int, new_tokens: int = 128) -> dict[str, float]:
    """Return seconds to the first token, tokens per second and sequence length of the prompt, medians after a warm-up.

    A question about one image; the time includes its preprocessing.
    """
    from yivl.inference.chat import Chat

    chat, first, rates = Chat(loaded), [], []
    for _ in range(repeats + 1):
        chat.reset()
        chat.ask(QUESTIONS[0], photo, temperature=0, max_new_tokens=new_tokens)
        answer = chat.last_answer
        assert answer is not None
        assert answer.new_tokens == new_tokens, "the answer ended early"
        first.append(answer.seconds_to_first_token)
        rates.append(answer.tokens_per_second)
    return {
        "first_token_seconds": statistics.median(first[1:]),
        "tokens_per_s": statistics.median(rates[1:]),
        "prompt_tokens": answer.prompt_tokens,
    }


def compare_with_bounds(
    model: Any, answer: dict[str, float], bandwidth: float, matmul_rate: float
) -> dict[str, dict[str, float]]:
    """Return the figures of ``measure_answer`` with their bounds: FLOPs of the prompt, bytes per token."""
    prompt_tokens = int(answer["prompt_tokens"])
    flops, bytes_per_token = prompt_flops(model.config, prompt_tokens), decoded_bytes(model, prompt_tokens)
    return {
        "first_token": {
            "seconds": answer["first_token_seconds"],
            "prompt_flops": flops,
            "times_the_bound": answer["first_token_seconds"] / (flops / matmul_rate),
        },
        "decode": {
            "tokens_per_s": answer["tokens_per_s"],
            "bytes_per_token": bytes_per_token,
            "times_the_bound": (1 / answer["tokens_per_s"]) / (bytes_per_token / bandwidth),
        },
    }


def measure_chat(loaded: Any, photo: Any, repeats: int) -> dict[str, Any]:
    """Return the seconds of the turns of a chat, and of one that re-computes its history and image every turn."""
    from yivl.inference.chat import Chat

    four_turns(Chat(loaded), photo)  # warm up
    ours = [four_turns(Chat(loaded), photo) for _ in range(repeats)]
    refed = [four_turns(Chat(loaded, reuse_cache=False), photo) for _ in range(repeats)]
    return {
        "new_tokens_per_turn": NEW_TOKENS,
        "turn_seconds": by_turn(ours, 1),
        "refed_turn_seconds": by_turn(refed, 1),
        "first_token_seconds": by_turn(ours, 0),
        "refed_first_token_seconds": by_turn(refed, 0),
        "first_token_over_refed": [a / b for a, b in zip(by_turn(ours, 0), by_turn(refed, 0), strict=True)],
    }


def four_turns(chat: Any, photo: Any) -> list[tuple[float, float]]:
    """Ask the four questions, the first with the image; return (first token, whole turn) in seconds for each."""
    seconds = []
    for index, question in enumerate(QUESTIONS):
        chat.ask(question, None if index else photo, temperature=0, max_new_tokens=NEW_TOKENS)
        seconds.append((chat.last_answer.seconds_to_first_token, chat.last_answer.seconds))
    return seconds


def by_turn(chats: list[list[tuple[float, float]]], what: int) -> list[float]:
    """Return the median over chats of a figure of every turn: 0 for the first token, 1 for the whole turn."""
    return [statistics.median(chat[turn][what] for chat in chats) for turn in range(len(QUESTIONS))]


def llava_baseline(baseline: "LlavaBaseline", photo: Any, repeats: int) -> dict[str, float]:
    """Return the seconds to the first token and the decoding rate of the LLaVA baseline."""
    device = str(baseline.model.device)

    def prompt() -> tuple[Any, Any]:
        return baseline.prefill(baseline.encode(photo))

    first = median_seconds(prompt, repeats, device)
    both = median_seconds(lambda: baseline.decode(*prompt(), NEW_TOKENS), repeats, device)
    return {"first_token": first, "tokens_per_s": NEW_TOKENS / (both - first)}


class LlavaBaseline:
    """The LLaVA baseline: the whole ViT, logits of every position, cache, layers and attention of transformers.

    Args:
        folder: Checkpoint folder.
        device: A torch device.
        dtype: ``float32`` or ``bfloat16``.
    """

    def __init__(self, folder: Path | str, device: str, dtype: Any) -> None:
        import torch

        from yivl.checkpoint.loading import load_model

        self.loaded = load_model(folder, device=device, dtype=dtype)
        self.model = self.loaded.model
        self.model.set_attn_implementation("sdpa")  # not the attention in blocks of a CPU
        use_layers_of_transformers(self.model)
        ids = question_ids(self.loaded.tokenizer, self.model.config.prompt_template)
        self.input_ids = torch.tensor([ids], device=self.model.device)

    def encode(self, photo: Any) -> Any:
        """Return the projected features of an image, ``(1, num_patches, hidden)``."""
        import torch

        with torch.inference_mode():
            pixels = self.loaded.image_processor([photo]).to(self.model.device, self.model.dtype)
            tower = self.model.get_vision_tower()
            hidden = [tower.vit.embed(pixels)]
            for layer in tower.vit.layers:
                hidden.append(layer(hidden[-1], attention_mask=None))
            return self.model.model.mm_projector(hidden[tower.num_layers][:, 1:])

    def prefill(self, features: Any) -> tuple[Any, Any]:
        """Return the first token, ``(1, 1)``, and the cache of the prompt."""
        import torch
        from transformers import DynamicCache

        with torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            fused = self.model.fuse(self.input_ids, image_features=features)
            hidden = self.model.model(inputs_embeds=fused.inputs_embeds, past_key_values=cache).last_hidden_state
            return self.model.lm_head(hidden).float()[:, -1:].argmax(-1), cache

    def decode(self, token: Any, cache: Any, new_tokens: int) -> None:
        """Compute ``new_tokens`` more tokens."""
        import torch

        with torch.inference_mode():
            for _ in range(new_tokens):
                hidden = self.model.model(input_ids=token, past_key_values=cache).last_hidden_state
                token = self.model.lm_head(hidden).float().argmax(-1)


def use_layers_of_transformers(model: Any) -> None:
    """Replace the decoder layers by those of transformers, with the same weights."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for index, layer in enumerate(model.model.layers):
        with torch.device("meta"):
            replacement = LlamaDecoderLayer(model.config, index).train(layer.training)
        replacement.load_state_dict(layer.state_dict(), assign=True)
        model.model.layers[index] = replacement


def question_ids(tokenizer: Any, template: Any) -> list[int]:
    """Return the ids of the prompt with one image and the first question, ``-200`` at the image."""
    from yivl.conversation import Turn
    from yivl.tokenization import tokenize

    return tokenize(template.render(template.messages([Turn(QUESTIONS[0], num_images=1)])), tokenizer)


def machine_rates(dtype: Any, device: str, repeats: int, size: int | None = None) -> tuple[float, float]:
    """Return memory bandwidth in bytes/s (reading) and rate of square products of ``size`` in FLOP/s.

    On a GPU ten operations are queued at a time, so that their launches take no time, on 2 GB, many times the cache (an
    H100 has 50 MB), and on products of 8,192: both last longer than a launch. On a CPU: 400 MB and 4,096.
    """
    import torch

    is_gpu = device.startswith("cuda")
    length, queued = (500_000_000, 10) if is_gpu else (100_000_000, 1)
    size = size or (8192 if is_gpu else 4096)

    def rate(work: Callable[[], object], amount: float, count: int) -> float:
        def run() -> None:
            for _ in range(queued):
                work()

        return queued * amount / median_seconds(run, count, device)

    with torch.inference_mode():
        vector = torch.ones(length, device=device)
        bandwidth = rate(vector.sum, 4 * length, 3 * repeats)
        if is_gpu:  # the sum may be slower than reading: a copy reads and writes
            bandwidth = max(bandwidth, rate(vector.clone, 8 * length, 3 * repeats))
        del vector
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return bandwidth, rate(lambda: a @ b, 2 * size**3, repeats)


def prompt_flops(config: Any, prompt_tokens: int) -> float:
    """Return the FLOPs of the matrix products of a prompt with one image (causal attention counts half)."""
    return vision_flops(config) + language_flops(config, prompt_tokens)


def decoded_bytes(model: Any, prompt_tokens: int) -> int:
    """Return the bytes read per new token: decoder weights, and the keys and values of the prompt."""
    config, modules = model.config, (model.model.layers, model.model.norm, model.lm_head)
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return int(weights + prompt_tokens * position)


def peak_bytes(device: str) -> int:
    """Return the peak of memory: allocated by PyTorch on a GPU, otherwise the resident set of this process."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_peak()


def resident_peak() -> int:
    """Return the peak resident set of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def rounded(value: Any) -> Any:
    """Return the results with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
