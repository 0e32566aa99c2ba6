"""Measure how far each precision is from float32: KL divergence of the logits, and agreement of greedy tokens.

python scripts/benchmark_quantization.py --markdown

Two models answer in float32: the small model, questions of its examination; the model of the golden values, whose
weights are random, so that its logits are close together. Every precision then computes the logits after the same
tokens, one at a time, as decoding does.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from yivl.checkpoint.loading import LoadedModel
    from yivl.inference.request import GenerationState

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden"
GOLDEN_QUESTIONS = ("Describe the image.", "图片里有什么？", "How many animals are there, and what do they do?")
Questions = list[tuple[str, "Image.Image"]]


def main() -> None:
    """Print one table for each model."""
    arguments = parse_args()

    from yivl.command_line import EMBEDDED_MODEL, log_to_stderr

    log_to_stderr()
    results = {
        "examination of the small model": measure(EMBEDDED_MODEL, examination(arguments.questions), arguments.tokens),
        "golden values": measure(GOLDEN / "checkpoint", golden_questions(), arguments.tokens),
    }
    if not arguments.markdown:
        print(json.dumps(results, indent=1))
        return
    for name, rows in results.items():
        print(f"\n{name}: {rows.pop('tokens')} tokens\n")
        print("| precision | KL divergence, nats per token | same greedy token | same answer |")
        print("|---|---|---|---|")
        for precision, row in rows.items():
            print(f"| {precision} | {row['kl']:.5f} | {row['tokens']:.2%} | {row['answers']:.1%} |")


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5, help="of each kind and language (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of JSON")
    return parser.parse_args()


def examination(number: int) -> Questions:
    """Return ``number`` questions of each kind and language about new scenes."""
    from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
    from yivl.tiny.world.rendering import render
    from yivl.tiny.world.words import LANGUAGES

    return [
        (question.text, render(scene, 192).image)
        for kind in EVALUATED_KINDS
        for language in LANGUAGES
        for scene, question in balanced_questions("scenes", kind, language, number)
    ]


def golden_questions() -> Questions:
    """Return questions about the images of the golden values."""
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in sorted((GOLDEN / "images").iterdir())[:8]]
    return [(question, image) for image in images for question in GOLDEN_QUESTIONS]


def precisions(folder: str | Path) -> Iterator[tuple[str, "LoadedModel"]]:
    """Yield the model in each precision; only one is in memory."""
    from yivl.checkpoint.folder import read_config
    from yivl.checkpoint.loading import load_model
    from yivl.checkpoint.support import check_support
    from yivl.errors import CheckpointError

    load: dict[str, Callable[[], LoadedModel]] = {
        "bfloat16": lambda: load_model(folder, device="cpu", dtype="bfloat16"),
        "bfloat16 weights, float32 products": lambda: _float32_products(folder),
        "8 bits": lambda: load_model(folder, device="cpu", load_in_8bit=True),
        "4 bits": lambda: load_model(folder, device="cpu", load_in_4bit=True),
        "8 bits (bitsandbytes)": lambda: _bitsandbytes(folder, 8),
    }
    with suppress(CheckpointError):  # bitsandbytes needs multiples of 64
        check_support(read_config(folder), "sdpa", bnb_bits_on_cpu=4)
        load["4 bits (bitsandbytes nf4)"] = lambda: _bitsandbytes(folder, 4)
    for name, function in load.items():
        yield name, function()
        gc.collect()


def _float32_products(folder: str | Path) -> "LoadedModel":
    from yivl.checkpoint.cpu_precision import compute_in_float32
    from yivl.checkpoint.loading import load_model

    loaded = load_model(folder, device="cpu", dtype="bfloat16")
    compute_in_float32(loaded.model)
    return loaded


def _bitsandbytes(folder: str | Path, bits: int) -> "LoadedModel":
    from yivl.checkpoint.loading import LoadedModel, load_model

    loaded = load_model(folder, device="cpu")
    dtype = loaded.model.dtype
    model = type(loaded.model).from_pretrained(folder, bits=bits, dtype=dtype, device_map={"": "cpu"}).eval()
    return LoadedModel(model, loaded.tokenizer, loaded.image_processor, loaded.name)


def measure(folder: str | Path, questions: Questions, max_new_tokens: int) -> dict[str, Any]:
    """Return the number of tokens, and by precision the KL divergence and the share of equal tokens and answers."""
    import torch
    from torch.nn import functional

    from yivl.checkpoint.loading import load_model
    from yivl.inference.engine import decode

    loaded = load_model(folder, device="cpu", dtype="float32")
    answers, expected = [], []
    for question, image in questions:
        state = begin(loaded, question, image, max_new_tokens)
        for _ in decode(loaded, state):
            pass
        answers.append(state.new_ids)
        expected.append(forced_logits(loaded, begin(loaded, question, image, max_new_tokens), state.new_ids))
    results: dict[str, Any] = {"tokens": sum(map(len, answers))}
    for name, candidate in precisions(folder):
        divergences, agreements = [], []
        for (question, image), ids, wanted in zip(questions, answers, expected, strict=True):
            found = forced_logits(candidate, begin(candidate, question, image, max_new_tokens), ids)
            pair = (found.log_softmax(-1), wanted.log_softmax(-1))
            divergences.append(functional.kl_div(*pair, log_target=True, reduction="none").sum(-1))
            agreements.append(found.argmax(-1) == wanted.argmax(-1))
        results[name] = {
            "kl": float(torch.cat(divergences).mean()),
            "tokens": float(torch.cat(agreements).float().mean()),
            "answers": sum(bool(agreed.all()) for agreed in agreements) / len(agreements),
        }
        sys.stderr.write(f"{name}: {results[name]}\n")
    return results


def begin(loaded: "LoadedModel", question: str, image: "Image.Image", max_new_tokens: int) -> "GenerationState":
    """Return the request of a greedy answer, with the image encoded by this model."""
    from yivl.inference.chat import Chat

    return Chat(loaded).begin(question, image, temperature=0, max_new_tokens=max_new_tokens)


def forced_logits(loaded: "LoadedModel", state: "GenerationState", ids: list[int]) -> "torch.Tensor":
    """Return the logits before each of ``ids``, ``(tokens, vocabulary)`` in float32."""
    import torch

    from yivl.inference.kv_cache import make_cache

    model, cache = loaded.model, make_cache()
    with torch.inference_mode():
        inputs = model.fuse(torch.tensor([state.input_ids]), image_features=state.features).inputs_embeds
        logits = [model(inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
        for token in ids[:-1]:
            logits.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, dim=1)[0].float()


if __name__ == "__main__":
    main()
