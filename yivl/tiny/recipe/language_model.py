"""The small language model learns the questions, in both languages, on written pictures.

A written picture is what a perfect ViT and projector would make of a scene: each patch is a small bag of words, the
sum of the embeddings of the words for what lies there. So the language model learns to look things up before it sees
pixels, and the projector later has something to aim at: the language model's own words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, SYSTEM_PROMPT
from yivl.conversation import Turn
from yivl.tiny.recipe.tokenizer import VOCAB_SIZE, WORDS, token_ids
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.language import caption, conversation, detail
from yivl.tiny.world.scenes import Scene, sample_scene
from yivl.tiny.world.words import LANGUAGES, Language, Word
from yivl.tokenization import encode_turns

GRID: Final = 6
QUESTIONS: Final = 8
_PIXELS_OF_PATCH: Final = 12  # of the drawing a written picture is read from
_BLOCK: Final = 16  # examples in a row of one form


def small_config() -> LlamaConfig:
    """Return the shape of the language model: Yi's, small."""
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


class Vocabulary:
    """The words a patch can be, as bags of token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.index = {_plain(word): number for number, word in enumerate(WORDS)}
        bags = [token_ids(word, tokenizer) for word in WORDS]
        self.tokens = pad_sequence([torch.tensor(bag) for bag in bags], batch_first=True, padding_value=-1)

    def embed(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return one vector for each word, ``(words, hidden)``: the sum of its tokens'."""
        tokens = self.tokens.to(embeddings.device)
        return (embeddings[tokens.clamp(min=0)] * (tokens >= 0).unsqueeze(-1)).sum(1)

    def ids(self, words: Sequence[Word]) -> list[int]:
        """Return the numbers of words."""
        return [self.index[_plain(word)] for word in words]

    def bags(self, patches: Sequence[tuple[Word, ...]]) -> torch.Tensor:
        """Return which words each patch is, ``(patches, words)`` of 0 and 1."""
        different = list(dict.fromkeys(patches))
        bags = torch.zeros(len(different), len(WORDS))
        for row, words in enumerate(different):
            bags[row, self.ids(words)] = 1
        number = {words: row for row, words in enumerate(different)}
        return bags[[number[words] for words in patches]]


def written_features(bags: torch.Tensor, embeddings: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return what stands for patches in the decoder, as large as its words, ``(..., patches, hidden)``."""
    features = bags @ vocabulary.embed(embeddings)
    size = embeddings.detach().pow(2).mean().sqrt()
    return functional.rms_norm(features, features.shape[-1:]) * size


def _plain(word: Word) -> Word:
    return Word(word.en, word.zh)


@dataclass(frozen=True)
class WrittenScenes(Dataset[dict[str, torch.Tensor]]):
    """Conversations about written pictures; number ``i`` is the same on every machine."""

    tokenizer: Any
    vocabulary: Vocabulary
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` (seq,), and ``bags`` (patches, words)."""
        rng = random.Random(f"written {index}")
        scene = sample_scene("train", index)
        # Neighbours share a batch, and batches of one length waste nothing. The system prompt is always the same and
        # a third of a conversation: once in four it is there, which is enough to know it.
        block = index // _BLOCK
        grid = 2 * GRID if block % 8 == 0 else GRID
        system = SYSTEM_PROMPT if block % 4 == 1 else ""
        encoded = encode_turns(conversation_turns(scene, rng.choice(LANGUAGES), rng), self.tokenizer, system)
        ids = torch.tensor(encoded.input_ids)
        labels = ids.masked_fill(~torch.tensor(encoded.is_target), IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels, "bags": _worn(self.bags(scene, grid), rng)}

    def bags(self, scene: Scene, grid: int) -> torch.Tensor:
        """Return the bags of words of a scene."""
        return self.vocabulary.bags(draw(scene, grid * _PIXELS_OF_PATCH).patches(grid))


def conversation_turns(scene: Scene, language: Language, rng: random.Random) -> list[Turn]:
    """Return one conversation about a scene; one in eight is a caption after no question, as in stages 1 and 2."""
    if rng.random() < 0.125:
        return [Turn("", (detail if rng.random() < 0.5 else caption)(scene, language), num_images=1)]
    questions = conversation(scene, language, rng, QUESTIONS)
    return [Turn(one.text, one.answer, num_images=int(number == 0)) for number, one in enumerate(questions)]


def _worn(bags: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return bags as a real tower would name them: never quite sure, and here and there wrong.

    Three patches in ten are partly another patch of the picture, as at the edges of things; two in ten are perhaps also
    some other word. One thing is several patches, so it can still be known by most of them.
    """
    worn = bags.clone()
    for patch in range(len(bags)):
        if rng.random() < 0.3:
            worn[patch].lerp_(bags[rng.randrange(len(bags))], rng.uniform(0, 0.6))
        if rng.random() < 0.2:
            worn[patch, rng.randrange(bags.shape[1])] += rng.uniform(0, 0.7)
    return worn


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch: every image slot becomes as many ids as its picture has patches."""
    ids, labels = [], []
    for row in rows:
        slot = int((row["input_ids"] == IMAGE_TOKEN_INDEX).nonzero())
        patches = torch.full((len(row["bags"]),), IMAGE_TOKEN_INDEX)
        ids.append(torch.cat([row["input_ids"][:slot], patches, row["input_ids"][slot + 1 :]]))
        labels.append(
            torch.cat([row["labels"][:slot], torch.full_like(patches, IGNORE_INDEX), row["labels"][slot + 1 :]])
        )
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "bags": torch.cat([row["bags"] for row in rows]),
    }


def answer_logits(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], vocabulary: Vocabulary, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``(targets, vocab)`` and targets ``(targets,)`` of the answers of a batch of written pictures.

    Args:
        model: The language model.
        batch: Of ``collate``.
        vocabulary: Of the patches.
        noise: Standard deviation of what is added to the features, in units of their size.
    """
    table = model.get_input_embeddings().weight
    is_patch = batch["input_ids"] == IMAGE_TOKEN_INDEX
    embeds = functional.embedding(batch["input_ids"].clamp(min=0), table)
    features = written_features(batch["bags"], table, vocabulary)
    features = features + noise * features.detach().pow(2).mean().sqrt() * torch.randn_like(features)
    embeds = embeds.masked_scatter(is_patch.unsqueeze(-1), features.to(embeds.dtype))
    # Padding is on the right, where causal attention never looks; it has no targets.
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE_INDEX
    return model.lm_head(hidden[wanted]), targets[wanted]
