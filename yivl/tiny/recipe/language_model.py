"""Pre-training of the small language model on symbolic images, before there is a ViT.

A symbolic image holds the features that a perfect ViT and projector would compute: for each patch the sum of the word
embeddings of its labels. The language model learns to look things up, and later defines the target of the projector.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from yivl.constants import IGNORE_INDEX
from yivl.conversation import YI_VL, Turn
from yivl.data.collator import Collator
from yivl.data.encoding import Sample
from yivl.model.fusion import expand_placeholders, merge_features
from yivl.tiny.recipe.loop import HeldOutScore, fit, training_folder
from yivl.tiny.recipe.tokenizer import PATCH_WORDS, VOCAB_SIZE, token_ids, train_tokenizer
from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
from yivl.tiny.world.language import caption, detail, dialogue
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import Scene, sample_scene
from yivl.tiny.world.words import LANGUAGES, Language, Word
from yivl.tokenization import encode_turns, load_tokenizer

GRID: Final = 6
_PATCH_PIXELS: Final = 12  # of the rendering from which the labels of a symbolic image are read
_BLOCK: Final = 16  # consecutive samples with the same grid and system prompt
_BATCH_SIZE: Final = 8
_EMBEDDING_STD: Final = 0.3  # of the initial word embeddings
_NOISE: Final = 0.3  # standard deviation of the noise on symbolic features, in units of their RMS
_TARGETS: Final = {"presence": 97.0, "count": 97.0, "place": 95.0, "sign": 99.0}


def small_config() -> LlamaConfig:
    """Return the configuration of the language model: the architecture of Yi at a small size."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=5e6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


class PatchVocabulary:
    """The labels of patches as token ids of both languages."""

    def __init__(self, tokenizer: Any) -> None:
        self.index = {word.en: number for number, word in enumerate(PATCH_WORDS)}
        tokens = [torch.tensor(token_ids(word, tokenizer)) for word in PATCH_WORDS]
        self.tokens = pad_sequence(tokens, batch_first=True, padding_value=-1)

    def embed(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the sum of the token embeddings of each word, ``(words, hidden)``."""
        tokens = self.tokens.to(embeddings.device)
        return (embeddings[tokens.clamp(min=0)] * (tokens >= 0).unsqueeze(-1)).sum(1)

    def ids(self, words: Sequence[Word]) -> list[int]:
        """Return the indices of words."""
        return [self.index[word.en] for word in words]

    def bags(self, labels: Sequence[tuple[Word, ...]]) -> torch.Tensor:
        """Return multi-hot labels of patches, ``(patches, words)``."""
        bags = torch.zeros(len(labels), len(PATCH_WORDS))
        for bag, words in zip(bags, labels, strict=True):
            bag[self.ids(words)] = 1
        return bags


def symbolic_features(bags: torch.Tensor, embeddings: torch.Tensor, vocabulary: PatchVocabulary) -> torch.Tensor:
    """Return the features of patches with the RMS of word embeddings, ``(..., patches, hidden)``."""
    features = bags @ vocabulary.embed(embeddings)
    return functional.rms_norm(features, features.shape[-1:]) * embeddings.detach().pow(2).mean().sqrt()


@dataclass(frozen=True)
class SymbolicScenes(Dataset[Sample]):
    """Dialogues about symbolic images, whose bags take the place of pixels; the same on every machine."""

    tokenizer: Any
    vocabulary: PatchVocabulary

    def __getitem__(self, index: int) -> Sample:
        """Return the encoded dialogue with noisy bags."""
        rng = random.Random(f"written {index}")
        scene = sample_scene("train", index)
        # One grid per batch avoids padding. The system prompt is constant and a third of a dialogue: one block in four
        # has it, which is enough to learn it.
        block = index // _BLOCK
        grid = 2 * GRID if block % 8 == 0 else GRID
        turns = _turns(scene, rng.choice(LANGUAGES), rng)
        return self.encode(turns, _add_noise(self.bags(scene, grid), rng), None if block % 4 == 1 else "")

    def bags(self, scene: Scene, grid: int) -> torch.Tensor:
        """Return the bags of a scene, ``(grid * grid, words)``."""
        return self.vocabulary.bags(render(scene, grid * _PATCH_PIXELS).patch_labels(grid))

    def encode(self, turns: Sequence[Turn], bags: torch.Tensor, system: str | None = None) -> Sample:
        """Return a dialogue as a training example."""
        encoded = encode_turns(turns, self.tokenizer, YI_VL, system)
        ids = torch.tensor(encoded.input_ids)
        labels = ids.masked_fill(~torch.tensor(encoded.is_target), IGNORE_INDEX)
        return Sample(ids, labels, bags.unsqueeze(0), len(ids) - 1 + len(bags))


def _turns(scene: Scene, language: Language, rng: random.Random) -> list[Turn]:
    """Return a dialogue about a scene, or one time in eight a caption without a question, as in stages 1 and 2."""
    if rng.random() < 0.125:
        return [Turn("", (detail if rng.random() < 0.5 else caption)(scene, language), num_images=1)]
    questions = enumerate(dialogue(scene, language, rng))
    return [Turn(question.text, question.answer, num_images=int(number == 0)) for number, question in questions]


def _add_noise(bags: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return bags with the errors of a real tower.

    Three patches in ten are blended with another patch of the image, as at borders; two in ten get a random word. An
    object covers several patches, so most of them still identify it.
    """
    noisy = bags.clone()
    for patch in range(len(bags)):
        if rng.random() < 0.3:
            noisy[patch].lerp_(bags[rng.randrange(len(bags))], rng.uniform(0, 0.6))
        if rng.random() < 0.2:
            noisy[patch, rng.randrange(bags.shape[1])] += rng.uniform(0, 0.7)
    return noisy


def answer_logits(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], vocabulary: PatchVocabulary, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``(targets, vocab)`` and target ids ``(targets,)`` of the answers in a batch.

    Args:
        model: The language model.
        batch: Batch of the ``Collator``, with bags ``(num_images, patches, words)`` as ``images``.
        vocabulary: Vocabulary of the bags.
        noise: Standard deviation of the noise on the features, in units of their RMS.
    """
    embeddings, bags = model.get_input_embeddings().weight, batch["images"]
    mask, labels = batch["attention_mask"], batch["labels"]
    expanded = expand_placeholders(batch["input_ids"], bags.shape[1], attention_mask=mask, labels=labels)
    assert expanded.labels is not None
    features = symbolic_features(bags, embeddings, vocabulary)
    features = features + noise * features.detach().pow(2).mean().sqrt() * torch.randn_like(features)
    text_embeds = functional.embedding(expanded.input_ids.clamp(min=0), embeddings)
    inputs_embeds = merge_features(expanded.input_ids, text_embeds, features)
    # No attention mask: padding is on the right, where causal attention never looks.
    hidden = model.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state[:, :-1]
    targets = expanded.labels[:, 1:]
    is_target = targets != IGNORE_INDEX
    return model.lm_head(hidden[is_target]), targets[is_target]


def initialize(model: LlamaForCausalLM) -> None:
    """Initialize weights by fan-in, in place; residual projections are scaled down with the depth.

    At this width a standard deviation of 0.02 makes look-ups take more than twice as many samples to learn.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = _EMBEDDING_STD if "embed_tokens" in name else float(parameter.shape[1]) ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= 0.3 / (2 * model.config.num_hidden_layers) ** 0.5
        nn.init.normal_(parameter, std=std)


def train(folder: Path, steps: int, questions: int) -> list[HeldOutScore]:
    """Train tokenizer and language model, save both as a Llama checkpoint, and return the held-out scores."""
    if not (folder / "tokenizer.model").is_file():
        train_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = PatchVocabulary(tokenizer)
    torch.manual_seed(0)
    config = small_config()
    config._attn_implementation = "eager"  # faster than the fused CPU kernel at this size (docs/tiny.md)
    model = LlamaForCausalLM(config)
    initialize(model)
    scenes = SymbolicScenes(tokenizer, vocabulary)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets = answer_logits(model, batch, vocabulary, _NOISE)
        return functional.cross_entropy(logits.float(), targets)

    collate = Collator(pad_token_id=0)
    fit(model, scenes, loss_of, training_folder(folder), steps=steps, batch_size=_BATCH_SIZE, collate=collate)
    model.save_pretrained(folder)
    return held_out_scores(model, scenes, questions)


@torch.inference_mode()
def held_out_scores(model: LlamaForCausalLM, scenes: SymbolicScenes, questions: int) -> list[HeldOutScore]:
    """Return the share of answers whose tokens all have the highest logit, which is when greedy decoding is right."""
    scores = []
    for kind in EVALUATED_KINDS:
        correct: list[bool] = []
        for language in LANGUAGES:
            examples = [
                scenes.encode([Turn(question.text, question.answer, num_images=1)], scenes.bags(scene, GRID))
                for scene, question in balanced_questions("scenes", kind, language, questions)
            ]
            for start in range(0, len(examples), 32):
                batch = examples[start : start + 32]
                logits, targets = answer_logits(model, Collator(pad_token_id=0)(batch), scenes.vocabulary, 0.0)
                lengths = [int((example.labels != IGNORE_INDEX).sum()) for example in batch]
                correct += [bool(answer.all()) for answer in torch.split(logits.argmax(-1) == targets, lengths)]
        score = 100 * sum(correct) / len(correct)
        scores.append(HeldOutScore(f"symbolic images: {kind}", score, _TARGETS.get(kind)))
    return scores
