"""Patch naming: auxiliary patch classification that pre-trains ViT and projector in the embedding space of the LLM.

For every patch the projected feature is trained to match the word embeddings of its labels. It replaces what a CLIP
trained on billions of images brings: a small ViT sees too few images to align through a frozen language model.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from yivl.model.modeling import YiVLForCausalLM
from yivl.model.vision_tower import VisionTower
from yivl.tiny.recipe.clip import make_processor
from yivl.tiny.recipe.language_model import PatchVocabulary, symbolic_features
from yivl.tiny.recipe.loop import HeldOutScore, fit, training_folder
from yivl.tiny.world import words
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import sample_scene
from yivl.train.arguments import ModelArguments
from yivl.train.initialization import load_start, read_start

_BATCH_SIZE: Final = 16
_BLOCK: Final = 16  # consecutive samples of one image size
_SMALL_SHARE: Final = 0.4  # of the steps, at the start, with small images only
_LOGIT_SCALE: Final = 24.0  # of the cosine similarities to the words
_WEIGHTS: Final = {words.WALL: 0.15, words.FLOOR: 0.15, words.SIGN: 2.0}  # of a patch in the loss; objects have 1
_TARGETS: Final = {"kind": 90.0, "place": 95.0, "activity": 90.0}
_GROUPS: Final[Mapping[str, Sequence[words.Word]]] = {
    "kind": words.KINDS,
    "place": words.PLACES,
    "activity": words.ACTIVITIES,
    "number": [words.Word(digit, digit) for digit in "0123456789"],
    "word": [words.Word(text, text) for text in words.SIGN_WORDS],
}


@dataclass(frozen=True)
class LabeledPatches(Dataset[dict[str, torch.Tensor]]):
    """Images with labels for every patch; the same on every machine."""

    vocabulary: PatchVocabulary
    patch_size: int
    side: int
    """Pixels on a side of a small image; a large one has twice as many."""
    num_small: int
    """Samples at the start that are all small; after them one block in five is."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` (3, side, side), ``bags`` (patches, words) and ``weights`` (patches,)."""
        side = self.side if index < self.num_small or index // _BLOCK % 5 == 0 else 2 * self.side
        # Some images are rendered larger, as those of users are: resizing makes edges sharper.
        rendered = render(sample_scene("train", index), side * (2 if random.Random(index).random() < 0.15 else 1))
        labels = rendered.patch_labels(side // self.patch_size)
        weights = [next((_WEIGHTS[word] for word in patch if word in _WEIGHTS), 1.0) for patch in labels]
        return {
            "pixel_values": make_processor(side)([rendered.image])[0],
            "bags": self.vocabulary.bags(labels),
            "weights": torch.tensor(weights),
        }


def interpolate_positions(tower: VisionTower) -> RemovableHandle:
    """Interpolate the position embeddings of a tower in every forward pass, differentiably, until ``remove()``."""

    def add_flag(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    handle: RemovableHandle = tower.vit.embeddings.register_forward_pre_hook(add_flag, with_kwargs=True)
    return handle


def naming_loss(
    features: torch.Tensor, batch: Mapping[str, torch.Tensor], embeddings: torch.Tensor, vocabulary: PatchVocabulary
) -> torch.Tensor:
    """Return the cross entropy over words by cosine similarity plus the relative squared error to the features wanted.

    Args:
        features: ``(num_images, patches, hidden)``.
        batch: ``bags`` and ``weights`` of ``LabeledPatches``.
        embeddings: Frozen word embeddings of the language model.
        vocabulary: Vocabulary of the bags.
    """
    features, bags, weights = features.float(), batch["bags"], batch["weights"]
    logits = _similarities(features, vocabulary.embed(embeddings), _LOGIT_SCALE)
    cross_entropy = -(functional.log_softmax(logits, -1) * bags).sum(-1) / bags.sum(-1)
    target = symbolic_features(bags, embeddings, vocabulary)
    distance = (features - target).pow(2).mean(-1) / target.pow(2).mean()
    return ((cross_entropy + distance) * weights).sum() / weights.sum()


def _similarities(features: torch.Tensor, words: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * functional.normalize(features, dim=-1) @ functional.normalize(words, dim=-1).T


def initialize_projector(projector: nn.Module, embeddings: torch.Tensor) -> None:
    """Initialize a projector by fan-in, with an output of the RMS of word embeddings, in place."""
    layers = list(projector.modules())
    for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
        nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    last = [layer for layer in layers if isinstance(layer, nn.LayerNorm)][-1]
    nn.init.constant_(last.weight, float(embeddings.pow(2).mean().sqrt()))


def train(language_model: Path, vision_tower: Path, folder: Path, steps: int, images: int) -> list[HeldOutScore]:
    """Train ViT and projector, save the checkpoint that stage 1 starts from, and return the held-out scores."""
    arguments = ModelArguments(
        model_name_or_path=str(language_model), vision_tower=str(vision_tower), attn_implementation="eager"
    )
    start = read_start(arguments)
    torch.manual_seed(0)
    model = load_start(start, arguments, dtype=torch.float32, packing=False)
    tower, projector = model.get_vision_tower(), model.model.mm_projector
    embeddings = model.get_input_embeddings().weight.detach()
    initialize_projector(projector, embeddings)
    vocabulary = PatchVocabulary(start.tokenizer)
    num_small = round(_SMALL_SHARE * steps) * _BATCH_SIZE
    samples = LabeledPatches(vocabulary, start.config.vision_config.patch_size, start.image_size, num_small)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        features = model.encode_images(batch["pixel_values"])
        return naming_loss(features, batch, embeddings.to(features.device), vocabulary)

    module = nn.ModuleDict({"tower": tower, "projector": projector})
    handle = interpolate_positions(tower)
    fit(module, samples, loss_of, training_folder(folder), steps=steps, batch_size=_BATCH_SIZE)
    scores = held_out_scores(model, samples, images)
    handle.remove()
    model.save_pretrained(folder, tokenizer=start.tokenizer, image_processor=start.image_processor.clip_processor)
    return scores


@torch.inference_mode()
def held_out_scores(model: YiVLForCausalLM, samples: LabeledPatches, images: int) -> list[HeldOutScore]:
    """Return the accuracy of patch classification on new scenes, by image size and group of labels."""
    vocabulary = samples.vocabulary
    word_features = vocabulary.embed(model.get_input_embeddings().weight)
    scores = []
    for side in (samples.side, 2 * samples.side):
        correct: dict[str, list[bool]] = {name: [] for name in _GROUPS}
        for number in range(images):
            rendered = render(sample_scene("scenes", number), side)
            bags = vocabulary.bags(rendered.patch_labels(side // samples.patch_size))
            features = model.encode_images(make_processor(side)([rendered.image]))[0]
            similarities = _similarities(features.float(), word_features)
            for name, group in _GROUPS.items():
                ids = vocabulary.ids(group)
                shown = bags[:, ids].sum(1) == 1
                correct[name] += (similarities[:, ids].argmax(1) == bags[:, ids].argmax(1))[shown].tolist()
        for name, hits in correct.items():
            target = _TARGETS.get(name, None if side == samples.side else 80.0)
            scores.append(HeldOutScore(f"patches at {side}: {name}", 100 * sum(hits) / max(1, len(hits)), target))
    return scores
