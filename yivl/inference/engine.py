"""Many conversations answered together: one step of the model gives each of them its next token.

A reply may join while others go on, and leaves when it is finished. Rows are padded on the left to the longest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import YiVLError
from yivl.inference.chat import Chat, GenerationState, ImageInput
from yivl.inference.kv_cache import make_cache
from yivl.model.fusion import position_ids_from_mask

Piece = tuple[GenerationState, str]
"""A reply that gained a token, and the text that settled with it, which may be empty."""


class Engine:
    """Replies that are decoded together, from ``Chat.begin`` of chats that share a model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._replies: list[GenerationState] = []
        self._lengths: list[int] = []  # positions of each row that are no padding
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self._replies)

    def clear(self) -> None:
        """Forget all replies, after an error for example."""
        self._replies, self._lengths, self._cache = [], [], None

    @torch.inference_mode()
    def add(self, replies: Sequence[GenerationState]) -> list[Piece]:
        """Compute the prompts of new replies, together, and return their first pieces.

        Raises:
            YiVLError: If a reply wants a beam search. After any error none of them has joined.
        """
        if any(reply.sampler.settings.num_beams > 1 for reply in replies):
            raise YiVLError("a beam search answers one question at a time; num_beams=1 in a batch")
        model = self.loaded.model
        rows = [torch.tensor(reply.input_ids) for reply in replies]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        mask = _left_padded([len(row) for row in rows])
        features = [reply.features for reply in replies if reply.features is not None]
        fused = model.fuse(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            image_features=torch.cat(features) if features else None,
            padding_side="left",
        )
        cache = make_cache(model.config.num_hidden_layers)
        logits = model(
            inputs_embeds=fused.inputs_embeds,
            attention_mask=fused.attention_mask if len(replies) > 1 else None,
            position_ids=fused.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        others = len(self._replies)
        try:
            self._join(cache, [len(reply.keys) for reply in replies])
            self._replies = [*self._replies, *replies]
            return self._take(replies, logits)
        except BaseException:
            # Memory may have run out between two layers: all of them go back to the rows that were there.
            self._replies, self._lengths = self._replies[:others], self._lengths[:others]
            self._keep(list(range(others)))
            raise

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Give every reply its next token; after an error only ``clear`` is left."""
        if not self._replies:
            return []
        device = self.loaded.model.device
        self._lengths = [length + 1 for length in self._lengths]
        mask = _left_padded(self._lengths).to(device)
        logits = self.loaded.model(
            input_ids=torch.tensor([reply.new_ids[-1:] for reply in self._replies], device=device),
            attention_mask=mask if len(set(self._lengths)) > 1 else None,
            position_ids=position_ids_from_mask(mask)[:, -1:],
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return self._take(self._replies, logits)

    def _take(self, replies: Sequence[GenerationState], logits: torch.Tensor) -> list[Piece]:
        """Choose a token for each reply from ``(replies, 1, vocabulary)``, and let go of those that it finishes."""
        scores = logits[:, -1].float()
        pieces = [
            (reply, reply.take(reply.sampler.choose(row), self.loaded.tokenizer))
            for reply, row in zip(replies, scores.unsqueeze(1), strict=True)
        ]
        going_on = [index for index, reply in enumerate(self._replies) if reply.finish_reason is None]
        if len(going_on) < len(self._replies):
            self._keep(going_on)
        return pieces

    def _join(self, cache: Cache, lengths: list[int]) -> None:
        """Add rows of keys and values, padding whichever are shorter."""
        if self._cache is None:
            self._cache, self._lengths = cache, lengths
            return
        self._lengths = self._lengths + lengths
        longest = max(self._lengths)
        for layer, new in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys = torch.cat([_pad_left(layer.keys, longest), _pad_left(new.keys, longest)])
            layer.values = torch.cat([_pad_left(layer.values, longest), _pad_left(new.values, longest)])

    def _keep(self, rows: list[int]) -> None:
        """Let go of all rows but these, and of padding that no row needs any more."""
        if not rows or self._cache is None:
            self.clear()
            return
        self._replies = [self._replies[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        longest = max(self._lengths)
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows, :, -longest:]
            layer.values = layer.values[rows, :, -longest:]


def answer_batch(
    loaded: LoadedModel,
    questions: Sequence[str],
    images: Sequence[ImageInput | None] | None = None,
    **sampling: Any,
) -> list[str]:
    """Return the answers to independent single-turn questions, generated together.

    Args:
        loaded: The model.
        questions: One per row.
        images: One picture or ``None`` per row.
        **sampling: Fields of ``Sampling``, for all of them.

    Raises:
        ImageError: If a picture cannot be used.
        YiVLError: If a sampling value is out of range, or beams are wanted.
        ValueError: If the numbers of questions and images differ.
    """
    images = [None] * len(questions) if images is None else images
    if len(images) != len(questions):
        raise ValueError(f"{len(questions)} questions but {len(images)} images")
    replies = [
        Chat(loaded).begin(question, image, **sampling) for question, image in zip(questions, images, strict=True)
    ]
    return finish_together(loaded, replies)


def finish_together(loaded: LoadedModel, replies: Sequence[GenerationState]) -> list[str]:
    """Generate replies from ``Chat.begin`` to their ends, in one batch, and return their texts."""
    batch = Engine(loaded)
    if replies:
        batch.add(replies)
    while len(batch):
        batch.step()
    return [reply.text for reply in replies]


def _left_padded(lengths: Sequence[int]) -> torch.Tensor:
    """Return the mask of rows of these lengths, ``(rows, longest)`` int64."""
    return (torch.arange(max(lengths)).flip(0) < torch.tensor(lengths)[:, None]).long()


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    """Return ``(batch, kv_heads, length, head_dim)`` with zeros before the states."""
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))
