"""Benchmark training steps against the LLaVA baseline, and the streaming data loader against decoding alone.

python scripts/benchmark_training.py --shape medium

The model has random weights; language model and projector are trained, the ViT is frozen, every micro-batch is an
optimizer step of AdamW. A sample is an image (256 or 1,024 patches), a prompt of 60 tokens and an answer of 10 to 400.
The LLaVA baseline pads samples in random order, runs all ViT layers and computes float32 logits of the whole sequence;
yivl groups samples by length, or packs them, and computes logits of target tokens only. Every run is a process of its
own, variants alternate, and results are medians over --repeats.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_inference import machine, machine_rates, resident_peak, rounded, use_layers_of_transformers
from flops import Trained, training_flops
from random_models import GOLDEN, SHAPES, shape_config

from yivl.train.cpu_threads import let_idle_threads_sleep

VARIANTS = {
    "llava": "",
    "grouped": "--group_by_length True",
    "packed": "--packing True",
    "packed_8bit": "--packing True --optim adamw_bnb_8bit",
}
"""The flags of ``yivl.train`` that a variant stands for."""
PROMPT_BEFORE, PROMPT_AFTER, SHORTEST, LONGEST = 40, 20, 10, 400
CURVE_STEPS = 20


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="(default: %(default)s)")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 448], help="pixels (default: 224 448)")
    parser.add_argument("--positions", type=int, default=5200, help="average tokens of a batch (default: 5200)")
    parser.add_argument("--batches", type=int, default=2, help="batches per run (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="precision of matrix products (default: %(default)s)",
    )
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa", help="attention kernels (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs per result (default: %(default)s)")
    parser.add_argument("--images", "--pictures", type=int, default=400, help="images to load (default: %(default)s)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # set in the process that trains
    parser.add_argument("--image-size", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()
    let_idle_threads_sleep()  # as training does
    if arguments.variant:
        print(json.dumps(train(arguments)))
        return

    import torch

    _, rate = machine_rates(getattr(torch, arguments.dtype), arguments.device, arguments.repeats)
    results: dict[str, Any] = {
        "machine": machine(arguments.device),
        "flags": vars(arguments),
        "matrix_products_flop_per_s": rate,
    }
    for image_size in arguments.image_sizes:
        runs = [measure_variants(arguments, image_size) for _ in range(arguments.repeats)]
        results[f"{(image_size // 14) ** 2} patches"] = compare(runs, rate)
    results["loss_curves"] = measure_loss_curves(arguments)
    results["loader"] = measure_loader(arguments.images, arguments.repeats)
    print(json.dumps(rounded(results), indent=2))


def measure_variants(arguments: argparse.Namespace, image_size: int) -> dict[str, dict[str, float]]:
    """Return the results of one run of each variant, each in a separate process."""
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant, "--image-size", str(image_size)]
        for name in ("shape", "positions", "batches", "dtype", "attention", "device"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[variant] = json.loads(output)
        print(f"{image_size} {variant}: {results[variant]}", file=sys.stderr)
    return results


def compare(runs: Sequence[dict[str, dict[str, float]]], rate: float) -> dict[str, Any]:
    """Return medians of each variant, and its ratios to the LLaVA baseline of the same repeat."""
    table: dict[str, Any] = {}
    for variant in VARIANTS:
        figures = {key: statistics.median(run[variant][key] for run in runs) for key in runs[0][variant]}
        figures["fraction_of_matrix_products"] = figures.pop("useful_flop_per_s") / rate
        for key in ("samples_per_s", "peak_bytes"):
            figures[f"{key}_over_llava"] = statistics.median(run[variant][key] / run["llava"][key] for run in runs)
        table[variant] = figures
    return table


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Return samples, tokens and useful FLOPs per second of one variant, and its memory."""
    import torch

    from yivl.data.sampler import BatchSampler

    config = shape_config(arguments.shape, image_size=arguments.image_size)
    model = make_model(arguments, config)
    optimizer = make_optimizer(arguments.variant, model, lr=1e-5)
    mean_length = config.num_patches + PROMPT_BEFORE + PROMPT_AFTER + (SHORTEST + LONGEST) // 2
    batch_size = arguments.positions // mean_length
    samples = random_examples(batch_size * arguments.batches, config)
    lengths = None if arguments.variant == "llava" else [sample.sequence_length for sample in samples]
    batches = list(BatchSampler([len(samples)], batch_size, lengths=lengths))

    image_processor = make_image_processor()

    def step(indices: Sequence[int]) -> None:
        take_step(arguments, model, optimizer, image_processor, [samples[index] for index in indices])

    step([0])  # warms up, and allocates the optimizer states
    start = time.perf_counter()
    for indices in batches:
        step(indices)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else resident_peak()
    return {
        "samples_per_s": len(samples) / seconds,
        "tokens_per_s": sum(sample.sequence_length for sample in samples) / seconds,
        "useful_flop_per_s": sum(useful_flops(config, sample) for sample in samples) / seconds,
        "peak_bytes": peak,
        "estimated_bytes": estimate(
            arguments, model, config, max(sample.sequence_length for sample in samples), batch_size
        ),
        "batch_size": batch_size,
    }


def measure_loss_curves(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how far the losses of each variant are from the baseline's, on the same batches of a small shape."""
    import torch

    config = shape_config("small", image_size=56)
    config.vocab_size, config.num_hidden_layers = 8000, 2  # seconds instead of minutes
    samples, image_processor = random_examples(8, config), make_image_processor()
    curves: dict[str, list[float]] = {}
    for variant in VARIANTS:
        own = argparse.Namespace(**vars(arguments) | {"variant": variant})
        model = make_model(own, config)
        optimizer = make_optimizer(variant, model, lr=3e-4)
        starts = [(2 * step) % len(samples) for step in range(CURVE_STEPS)]
        curves[variant] = [
            take_step(own, model, optimizer, image_processor, samples[start : start + 2]) for start in starts
        ]
    baseline = torch.tensor(curves["llava"])
    return {
        "steps": CURVE_STEPS,
        "first_and_last_loss": {variant: [curve[0], curve[-1]] for variant, curve in curves.items()},
        "largest_relative_difference": {
            variant: float(((torch.tensor(curve) - baseline).abs() / baseline).max())
            for variant, curve in curves.items()
        },
    }


def make_model(arguments: argparse.Namespace, config: Any) -> Any:
    """Return the model of a variant, with the same random weights in all of them."""
    import torch

    from yivl.model.attention import register_packed_sdpa
    from yivl.model.modeling import YiVLForCausalLM

    packing = "--packing" in VARIANTS[arguments.variant]
    config.use_cache = False  # as the trainer of transformers sets it
    config._attn_implementation = (
        register_packed_sdpa() if packing and arguments.attention == "sdpa" else arguments.attention
    )
    torch.manual_seed(0)
    model = YiVLForCausalLM(config).to(arguments.device).train()
    # Frozen weights are in the dtype of the matrix products, in LLaVA too.
    model.get_vision_tower().requires_grad_(False).eval().to(getattr(torch, arguments.dtype))
    if arguments.variant == "llava":
        use_layers_of_transformers(model)
    return model


def make_image_processor() -> Any:
    """Return the image processor, which normalizes the images of a batch."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from yivl.image_processing import ImageProcessor

    return ImageProcessor(CLIPImageProcessorPil())


def take_step(
    arguments: argparse.Namespace, model: Any, optimizer: Any, image_processor: Any, samples: Sequence[Any]
) -> float:
    """Train on one batch, and return its loss."""
    import torch

    from yivl.data.collator import Collator, normalize_images

    collated = Collator(0, packing="--packing" in VARIANTS[arguments.variant])(samples)
    batch = {key: value.to(arguments.device) for key, value in collated.items()}
    batch = normalize_images(batch, image_processor)
    with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
        loss = (llava_loss if arguments.variant == "llava" else yivl_loss)(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())  # waits for the device


def make_optimizer(variant: str, model: Any, lr: float) -> Any:
    """Return AdamW as transformers makes it for the ``--optim`` of a variant."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "adamw_bnb_8bit" in VARIANTS[variant]:
        from bitsandbytes.optim import AdamW

        return AdamW(trainable, lr=lr, weight_decay=0.0, optim_bits=8)
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)


def estimate(arguments: argparse.Namespace, model: Any, config: Any, longest: int, batch_size: int) -> float:
    """Return the memory that the dry run estimates for a variant and samples of the longest length, in bytes."""
    from yivl.train.arguments import parse_arguments
    from yivl.train.memory import estimate_memory
    from yivl.train.parameters import part_sizes
    from yivl.train.plan import Zero

    flags = f"--model_name_or_path m --data_path d --output_dir o --model_max_length {longest}".split()
    flags += ["--per_device_train_batch_size", str(batch_size), "--bf16", str(arguments.dtype == "bfloat16")]
    parsed = parse_arguments(flags + VARIANTS[arguments.variant].split())
    return estimate_memory(part_sizes(model, parsed.training), config, parsed, Zero(), 1).total


def random_examples(count: int, config: Any, shortest: int = SHORTEST, longest: int = LONGEST) -> list[Any]:
    """Return samples with an image, a prompt and an answer of ``shortest`` to ``longest`` tokens."""
    import torch

    from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from yivl.data.encoding import Sample

    size, examples = config.vision_config.image_size, []
    torch.manual_seed(1)
    for _ in range(count):
        answer = int(torch.randint(shortest, longest + 1, ()))
        ids = torch.randint(10, config.vocab_size, (PROMPT_BEFORE + 1 + PROMPT_AFTER + answer,))
        ids[PROMPT_BEFORE] = IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:-answer] = IGNORE_INDEX
        pixels = torch.randint(256, (1, size, size, 3), dtype=torch.uint8)
        examples.append(Sample(ids, labels, pixels, len(ids) - 1 + config.num_patches))
    return examples


def yivl_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Return the loss as the trainer computes it."""
    return model(**batch, skip_logits=True).loss


def llava_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Return the same loss as LLaVA computes it: all ViT layers, float32 logits of the whole sequence."""
    import torch

    tower = model.get_vision_tower()
    with torch.no_grad():
        features = tower.vit(batch["images"], output_hidden_states=True).hidden_states[tower.num_layers][:, 1:]
    fused = model.fuse(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        image_features=model.model.mm_projector(features),
    )
    hidden = model.model(
        inputs_embeds=fused.inputs_embeds,
        attention_mask=fused.attention_mask,
        position_ids=fused.position_ids,
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden).float()
    shifted, targets = logits[:, :-1].contiguous(), fused.labels[:, 1:].contiguous()
    return torch.nn.functional.cross_entropy(shifted.flatten(0, 1), targets.flatten())


def useful_flops(config: Any, sample: Any) -> float:
    """Return the FLOPs of a sample; language model and projector are trained."""
    from yivl.constants import IGNORE_INDEX

    targets = int((sample.labels != IGNORE_INDEX).sum())
    return training_flops(config, sample.sequence_length, targets, Trained(projector=True, language_model=True))


def measure_loader(count: int, repeats: int) -> dict[str, float]:
    """Return images per second of one streaming worker, and its time relative to decoding and resizing alone."""
    import torch
    from PIL import Image

    from yivl.checkpoint.loading import read_small_files
    from yivl.data.encoding import Encoder
    from yivl.data.sources import DataSource
    from yivl.data.streaming import StreamDataset, StreamSampler
    from yivl.image_processing import expand2square
    from yivl.train.dataloaders import keep_image_memory

    torch.set_num_threads(1)  # as in a data-loading worker
    keep_image_memory()
    config, tokenizer, image_processor = read_small_files(GOLDEN / "checkpoint")
    clip = image_processor.clip_processor
    clip.size, clip.crop_size = {"shortest_edge": 448}, {"height": 448, "width": 448}
    encoder = Encoder(tokenizer, image_processor, 1024, 2048, config.prompt_template)
    with tempfile.TemporaryDirectory() as temporary:
        files = write_images(Path(temporary) / "00000.tar", count)
        source = DataSource(str(Path(temporary) / "*.tar"))

        def decode() -> None:
            for data in files:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                expand2square(image, image_processor.background).resize((448, 448), Image.Resampling.BICUBIC)

        def stream() -> None:
            dataset = StreamDataset([source], encoder, print, 8)
            for batch in StreamSampler(8, count // 8):
                dataset.__getitems__(batch)

        ratios, rates = [], []
        for _ in range(repeats):
            times = []
            for work in (decode, stream):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
            rates.append(count / times[1])
    return {"images_per_s_per_worker": statistics.median(rates), "time_over_decoding": statistics.median(ratios)}


def write_images(path: Path, count: int) -> list[bytes]:
    """Write a tar shard of captioned JPEG images with sizes as in LAION, and return the image files."""
    import tarfile

    from PIL import Image

    photo = Image.open(GOLDEN.parents[1] / "images/coffee.jpg").convert("RGB")
    files = []
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = io.BytesIO()
            photo.resize((512 + number % 128, 384 + number % 96)).save(data, "JPEG", quality=90)
            files.append(data.getvalue())
            for suffix, content in (("jpg", files[-1]), ("txt", f"A cup of coffee, number {number}.".encode())):
                entry = tarfile.TarInfo(f"{number:09d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return files


if __name__ == "__main__":
    main()
