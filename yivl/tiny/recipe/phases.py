"""The phases before stage 1: each from files to files, each ending with held-out scores beside their targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from yivl.constants import IGNORE_INDEX
from yivl.conversation import Turn
from yivl.tiny.recipe import clip as contrastive
from yivl.tiny.recipe import language_model as written
from yivl.tiny.recipe import naming as patches
from yivl.tiny.recipe.loop import Settings, fit
from yivl.tiny.recipe.tokenizer import train_tokenizer
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.exam import EXAM_KINDS, examine
from yivl.tiny.world.scenes import sample_scene
from yivl.tiny.world.words import ACTIVITIES, KINDS, LANGUAGES, PLACES, SIGN_WORDS, Word
from yivl.tokenization import encode_turns, load_tokenizer
from yivl.train.arguments import ModelArguments
from yivl.train.initialization import load_start, read_start

_BATCH: Final = {"language_model": 8, "clip": 128, "naming": 16}
_RATE: Final = 1e-3  # of AdamW
_MATRIX_RATE: Final = {"language_model": 1e-3, "clip": 1e-3, "naming": 1e-3}  # of Muon
_EMBEDDING_SIZE: Final = 0.3  # standard deviation of fresh word embeddings
_NOISE: Final = 0.3  # on written pictures, in units of their size
_SMALL_SHARE: Final = 0.4  # of the naming phase, on small pictures alone


@dataclass(frozen=True)
class GateScore:
    """One held-out score of a phase, in percent."""

    name: str
    reached: float
    target: float | None


def training_folder(folder: Path) -> Path:
    """Return where the state of a phase lies: beside what it writes, which is a checkpoint and nothing else."""
    return folder.with_name(f"{folder.name}.training")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def language_model(folder: Path, steps: int, questions: int) -> list[GateScore]:
    """Make the tokenizer, train the language model on written pictures, write both as a Llama folder."""
    if not (folder / "tokenizer.model").is_file():
        train_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = written.Vocabulary(tokenizer)
    torch.manual_seed(0)
    config = written.small_config()
    # The CPU's fused kernels are slower in training than plain products at this size (docs/tiny.md).
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    _spread(model)
    scenes = written.WrittenScenes(tokenizer, vocabulary, steps * _BATCH["language_model"])

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets = written.answer_logits(model, batch, vocabulary, _NOISE)
        return functional.cross_entropy(logits.float(), targets)

    settings = Settings(steps, _BATCH["language_model"], _RATE, _MATRIX_RATE["language_model"])
    fit(model.to(_device()), scenes, loss_of, settings, training_folder(folder), collate=written.collate)
    model.cpu().save_pretrained(folder)
    return _written_gate(model, scenes, questions)


def _spread(model: LlamaForCausalLM) -> None:
    """Draw fresh weights by fan-in, in place.

    At this width the usual 0.02 leaves layers that hardly do anything, and look-ups take twice as long to appear.
    """
    depth = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        size = _EMBEDDING_SIZE if "embed_tokens" in name else float(parameter.shape[1]) ** -0.5
        if "o_proj" in name or "down_proj" in name:
            size *= _EMBEDDING_SIZE / depth**0.5
        nn.init.normal_(parameter, std=size)


@torch.inference_mode()
def _written_gate(model: LlamaForCausalLM, scenes: written.WrittenScenes, questions: int) -> list[GateScore]:
    """Return how often every token of an answer is the likeliest: the same event as the greedy answer being right."""
    targets = {"presence": 97.0, "count": 97.0, "place": 95.0, "sign": 99.0}
    scores = []
    for kind in EXAM_KINDS:
        right = total = 0
        for language in LANGUAGES:
            rows = []
            for task in examine("scenes", kind, language, questions):
                turn = Turn(task.question.text, task.question.answer, num_images=1)
                encoded = encode_turns([turn], scenes.tokenizer)
                ids, wanted = torch.tensor(encoded.input_ids), torch.tensor(encoded.is_target)
                labels = ids.masked_fill(~wanted, IGNORE_INDEX)
                rows.append({"input_ids": ids, "labels": labels, "bags": scenes.bags(task.scene, written.GRID)})
            for start in range(0, len(rows), 32):
                batch = written.collate(rows[start : start + 32])
                logits, wanted = written.answer_logits(model, batch, scenes.vocabulary, 0.0)
                is_target = batch["labels"][:, 1:] != IGNORE_INDEX
                good = torch.ones_like(is_target)
                good[is_target] = logits.argmax(-1) == wanted
                right, total = right + int(good.all(1).sum()), total + len(good)
        scores.append(GateScore(f"written {kind}", 100 * right / total, targets.get(kind)))
    return scores


def clip(language_model_folder: Path, folder: Path, steps: int, pairs: int) -> list[GateScore]:
    """Train a CLIP on pictures and captions and write it as an open_clip folder."""
    tokenizer = load_tokenizer(language_model_folder)
    torch.manual_seed(0)
    model = contrastive.build_clip()
    processor = patches.processor_for(contrastive.IMAGE_SIZE)
    scenes = contrastive.CaptionedScenes(tokenizer, processor, "train", steps * _BATCH["clip"])
    fit(
        model.to(_device()),
        scenes,
        lambda batch: contrastive.contrastive_loss(model, batch),
        Settings(steps, _BATCH["clip"], _RATE, _MATRIX_RATE["clip"]),
        training_folder(folder),
        collate=contrastive.collate,
    )
    contrastive.save_clip(model.cpu(), folder)
    held_out = contrastive.CaptionedScenes(tokenizer, processor, "scenes", pairs)
    batch = contrastive.collate([held_out[index] for index in range(pairs)])
    with torch.inference_mode():
        image_features, text_features, _ = model(batch["pixel_values"], batch["ids"])
    right = (image_features @ text_features.T).argmax(1) == torch.arange(pairs)
    return [GateScore(f"caption among {pairs}", 100 * float(right.float().mean()), None)]


def naming(language_model_folder: Path, vision_tower: Path, folder: Path, steps: int, pictures: int) -> list[GateScore]:
    """Train ViT and projector to name patches, and write a whole checkpoint, which stage 1 starts from."""
    arguments = ModelArguments(
        model_name_or_path=str(language_model_folder), vision_tower=str(vision_tower), attn_implementation="eager"
    )
    start = read_start(arguments)
    torch.manual_seed(0)
    model = load_start(start, arguments, dtype=torch.float32, packing=False)
    tower, projector = model.get_vision_tower(), model.model.mm_projector
    table = model.to(_device()).get_input_embeddings().weight.detach()
    patches.start_projector(projector, table)
    vocabulary = written.Vocabulary(start.tokenizer)
    side = start.image_size
    scenes = patches.NamedPatches(
        vocabulary,
        {size: patches.processor_for(size) for size in (side, 2 * side)},
        contrastive.PATCH_SIZE,
        number=steps * _BATCH["naming"],
        small_until=round(_SMALL_SHARE * steps) * _BATCH["naming"],
    )

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        features = patches.encode(tower, projector, batch["pixel_values"])
        return patches.naming_loss(features, batch, table, vocabulary)

    settings = Settings(steps, _BATCH["naming"], _RATE, _MATRIX_RATE["naming"])
    fit(nn.ModuleDict({"tower": tower, "projector": projector}), scenes, loss_of, settings, training_folder(folder))
    model.cpu().save_pretrained(folder, tokenizer=start.tokenizer, image_processor=start.image_processor.clip_processor)
    return _naming_gate(model, scenes, table.cpu(), pictures)


@torch.inference_mode()
def _naming_gate(model: Any, scenes: patches.NamedPatches, table: torch.Tensor, pictures: int) -> list[GateScore]:
    """Return how many patches of new scenes are named right, by what they show and by the size of the picture."""
    vocabulary = scenes.vocabulary
    words = functional.normalize(vocabulary.embed(table), dim=-1)
    groups: Mapping[str, Sequence[Word]] = {
        "kind": KINDS,
        "place": PLACES,
        "activity": ACTIVITIES,
        "number": [Word(digit, digit) for digit in "0123456789"],
        "word": [Word(text, text) for text in SIGN_WORDS],
    }
    scores = []
    for side, processor in scenes.processors.items():
        right = {name: [0, 0] for name in groups}
        for number in range(pictures):
            picture = draw(sample_scene("scenes", number), side)
            bags = vocabulary.bags(picture.patches(side // scenes.patch_size))
            pixel_values = processor([picture.image])
            features = patches.encode(model.get_vision_tower(), model.model.mm_projector, pixel_values)[0]
            similar = functional.normalize(features.float(), dim=-1) @ words.T
            for name, group in groups.items():
                ids = vocabulary.ids(group)
                shown = bags[:, ids].sum(1) == 1
                named = similar[:, ids].argmax(1) == bags[:, ids].argmax(1)
                right[name][0] += int(named[shown].sum())
                right[name][1] += int(shown.sum())
        target = {"kind": 90.0, "place": 95.0, "activity": 90.0}
        for name, (good, total) in right.items():
            large = side != min(scenes.processors)
            goal = target.get(name, 80.0 if large else None)
            scores.append(GateScore(f"patches at {side}: {name}", 100 * good / max(1, total), goal))
    return scores
