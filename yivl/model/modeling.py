"""YiVLForCausalLM: vision tower, projector, fusion, then the Llama decoder of transformers, unchanged.

Everything visual happens before the decoder and reaches it as ``inputs_embeds``, so its cache, attention back ends
and generation are the library's own.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.inference.cpu import explicit_mask, native_matrix_vector
from yivl.inference.kv_cache import make_cache
from yivl.model.configuration import YiVLConfig
from yivl.model.fusion import (
    PaddingSide,
    expand_placeholders,
    merge_features,
    packed_layout,
    position_ids_from_mask,
)
from yivl.model.loss import supervised_loss
from yivl.model.projector import build_projector
from yivl.model.rotary import ExactRotaryEmbedding
from yivl.model.vision_tower import VisionTower

logger = logging.getLogger(__name__)

Images = torch.Tensor | Sequence[torch.Tensor]
"""One picture per placeholder, in order: ``(num_images, 3, image_size, image_size)``, or a list whose items are
``(3, image_size, image_size)`` or ``(n, 3, image_size, image_size)``."""


@dataclass(frozen=True)
class Fused:
    """What the decoder reads; see ``fusion`` for the shapes."""

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    """``None`` where rows are packed: nothing is padding, and ``packed_lengths`` keeps the rows apart."""
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    packed_lengths: list[int] | None = None

    def packed_kwargs(self) -> dict[str, Any]:
        """Return what the attention kernels need to keep packed rows apart: ours, and FlashAttention's arguments."""
        if self.packed_lengths is None:
            return {}
        ends = torch.tensor([0, *self.packed_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends, longest = ends.to(self.inputs_embeds.device), max(self.packed_lengths)
        flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {"packed_lengths": self.packed_lengths, "use_cache": False} | flash


class YiVLModel(LlamaModel):  # type: ignore[misc]
    """The Llama decoder with the vision tower and the projector beside it, where the checkpoint keeps them."""

    config: YiVLConfig

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.rotary_emb = ExactRotaryEmbedding(config)
        self.vision_tower = VisionTower(config)  # checkpoint key
        self.mm_projector = build_projector(  # checkpoint key
            config.mm_projector_type, config.mm_hidden_size, config.hidden_size
        )
        # First in line, so that a device map that runs out of GPU memory moves decoder layers away, not the ViT.
        for name in [name for name, _ in self.named_children() if name not in ("vision_tower", "mm_projector")]:
            module = getattr(self, name)
            delattr(self, name)
            setattr(self, name, module)
        self.post_init()


class YiVLForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Yi-VL. State-dict names are those of the published checkpoints."""

    config: YiVLConfig
    _no_split_modules = ["LlamaDecoderLayer", "VisionTower"]  # noqa: RUF012 (a transformers class attribute)

    def __init__(self, config: YiVLConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not its own __init__, which would build a plain decoder
        self.model = YiVLModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_vision_tower(self) -> VisionTower:
        """Return the vision tower (lineage name)."""
        tower: VisionTower = self.model.vision_tower
        return tower

    def resize_images(self, image_size: int) -> None:
        """Make the model read pictures of ``image_size`` pixels a side; the ViT's position table is interpolated.

        Raises:
            ValueError: If ``image_size`` is no whole number of patches.
        """
        vision_config = self.config.vision_config
        if image_size % vision_config.patch_size:
            raise ValueError(f"image_size={image_size} is no multiple of the patch size {vision_config.patch_size}")
        if image_size != vision_config.image_size:
            logger.info("position table interpolated from %d to %d pixels", vision_config.image_size, image_size)
            self.get_vision_tower().resize(image_size)
            vision_config.image_size = image_size

    def encode_images(self, images: Images) -> torch.Tensor:
        """Return projected features, ``(num_images, num_patches, hidden)``.

        Raises:
            ValueError: If a picture has another size than the ViT expects.
        """
        if not isinstance(images, torch.Tensor):
            images = torch.cat([image.unsqueeze(0) if image.ndim == 3 else image for image in images])
        images = images.unsqueeze(0) if images.ndim == 3 else images
        weight = self.model.vision_tower.vit.embeddings.class_embedding
        # An offloaded tower has no device of its own; its hooks move the pixels.
        device = None if weight.device.type == "meta" else weight.device
        pixel_values = images.flatten(0, -4).to(device=device, dtype=weight.dtype)
        features: torch.Tensor = self.model.mm_projector(self.model.vision_tower(pixel_values))
        return features

    def fuse(
        self,
        input_ids: torch.Tensor,
        images: Images | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        row_lengths: torch.Tensor | None = None,
        padding_side: PaddingSide = "right",
    ) -> Fused:
        """Return the decoder's input for ``(batch, seq)`` ids with ``-200`` at image slots.

        Args:
            input_ids: ``(batch, seq)`` int64.
            images: One picture per placeholder, in order over the whole batch.
            attention_mask: ``(batch, seq)``; ``None`` means that nothing is padding, whatever the ids are.
            labels: ``(batch, seq)`` int64.
            image_features: ``(num_images, num_patches, hidden)`` instead of ``images``, already projected.
            row_lengths: ``(num_rows,)`` int64: the single sequence holds packed rows of that many ids each.
            padding_side: Where the fused rows are padded.

        Raises:
            ValueError: If placeholders and images differ in number.
        """
        num_patches: int = self.config.num_patches
        expanded = expand_placeholders(
            input_ids, num_patches, attention_mask=attention_mask, labels=labels, padding_side=padding_side
        )
        text_ids = expanded.input_ids.masked_fill(expanded.input_ids == IMAGE_TOKEN_INDEX, 0)
        text_embeds: torch.Tensor = self.get_input_embeddings()(text_ids)
        if image_features is None and images is not None and len(images):
            image_features = self.encode_images(images)
        if image_features is None:
            image_features = text_embeds.new_zeros(0, num_patches, text_embeds.shape[-1])
        inputs_embeds = merge_features(expanded.input_ids, text_embeds, image_features)
        if not len(image_features) and (is_deepspeed_zero3_enabled() or (self.training and self._trains_vision())):
            inputs_embeds = inputs_embeds + self._untouched_vision().to(inputs_embeds)
        if row_lengths is None:
            position_ids = position_ids_from_mask(expanded.attention_mask)
            return Fused(inputs_embeds, expanded.attention_mask, position_ids, expanded.labels)
        packed = packed_layout(input_ids, row_lengths, num_patches)
        if expanded.labels is not None:
            expanded.labels[0, packed.starts] = IGNORE_INDEX  # the end of one row does not predict the next
        return Fused(inputs_embeds, None, packed.position_ids, expanded.labels, packed.lengths)

    def _untouched_vision(self) -> torch.Tensor:
        """Return a zero that depends on tower and projector.

        With several processes every one must run the same modules in the same order, embeddings first: under ZeRO-3 a
        rank whose batch holds no picture would otherwise gather other weights than the rest, and all would hang. And
        with one process a step without pictures must be the step that several would take: gradients of zero, which
        move a parameter by its momentum, and not none, which leave it where it is.
        """
        size = self.config.vision_config.image_size
        return self.encode_images(torch.zeros(1, 3, size, size)).float().sum() * 0

    def _trains_vision(self) -> bool:
        parts = (self.model.vision_tower, self.model.mm_projector)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        row_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, with labels, the loss.

        Args:
            input_ids: ``(batch, seq)`` int64 with ``-200`` at image slots.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: Rotary positions, ``(batch, fused)``; by default the count of real tokens before.
            past_key_values: Key-value cache of transformers.
            inputs_embeds: ``(batch, fused, hidden)`` instead of ``input_ids``.
            labels: ``(batch, seq)`` int64, ``IGNORE_INDEX`` where no loss is taken.
            use_cache: Whether to return a cache.
            images: One picture per placeholder; rows without a placeholder take none. Ignored by one-token steps with
                a cache, as in the lineage.
            logits_to_keep: Compute logits only for that many last positions, or for these; 0 means all.
            skip_logits: Return no logits beside the loss; by default true while training with labels.
            num_items_in_batch: Supervised tokens of the optimizer step, the divisor of the loss.
            row_lengths: ``(num_rows,)`` int64: ``input_ids`` is one sequence of packed rows of that many ids each.
            **kwargs: Flags of the transformers decoder, such as ``output_hidden_states``.

        Raises:
            ValueError: If placeholders and images differ in number, or images follow a filled cache.
        """
        is_step = input_ids is not None and input_ids.shape[1] == 1 and past_key_values is not None and labels is None
        if input_ids is not None and not is_step:
            if past_key_values is None or not past_key_values.get_seq_length():
                fused = self.fuse(
                    input_ids, images, attention_mask=attention_mask, labels=labels, row_lengths=row_lengths
                )
                kwargs |= fused.packed_kwargs()
                input_ids, inputs_embeds, labels = None, fused.inputs_embeds, fused.labels
                attention_mask = fused.attention_mask
                position_ids = fused.position_ids if position_ids is None else position_ids
            elif images is not None:
                raise ValueError("images cannot follow a filled cache; generate() takes the whole sequence instead")
        kernels: AbstractContextManager[None] = nullcontext()
        # With static shapes the mask is complete already, and the compiler does better than we.
        if is_step and input_ids is not None and not (torch.compiler.is_compiling() or past_key_values.is_compileable):
            num_keys = past_key_values.get_seq_length() + 1
            attention_mask, kernels = self._prepare_step(len(input_ids), num_keys, attention_mask)
        with kernels:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **{"use_cache": use_cache} | kwargs,
            )
            hidden_states = outputs.last_hidden_state
            logits = None
            if not (self.training and labels is not None if skip_logits is None else skip_logits):
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self.lm_head(hidden_states[:, kept])
        loss = None if labels is None else supervised_loss(hidden_states, labels, self.lm_head, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_step(
        self, num_rows: int, num_keys: int, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, AbstractContextManager[None]]:
        """Return mask and kernels of a one-token step whose cache will hold ``num_keys`` positions."""
        if attention_mask is not None and attention_mask.ndim == 2:
            # The lineage counts an image as one position here; what the cache holds beyond the mask is visible.
            missing = max(num_keys - attention_mask.shape[1], 0)
            attention_mask = nn.functional.pad(attention_mask, (missing, 0), value=1)
        if self.device.type != "cpu":
            return attention_mask, nullcontext()
        if self.config._attn_implementation == "sdpa":
            attention_mask = explicit_mask(attention_mask, num_rows, num_keys)
        is_matrix_vector = num_rows == 1 and self.dtype == torch.bfloat16
        return attention_mask, native_matrix_vector if is_matrix_vector else nullcontext()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after a prompt with ``-200`` at image slots; the result holds the prompt ids as they were given.

        Args:
            inputs: ``(batch, seq)`` int64; ``input_ids`` is the same.
            images: One picture per placeholder, in order over the whole batch.
            attention_mask: ``(batch, seq)``; ``None`` means that nothing is padding, whatever the ids are.
            image_features: ``(num_images, num_patches, hidden)`` instead of ``images``.
            **kwargs: Arguments of ``GenerationMixin.generate``. With ``past_key_values`` the prompt is the whole
                sequence; only what the cache does not hold yet is computed.

        Raises:
            ValueError: If there are no ids, or placeholders and images differ in number.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        fused = self.fuse(
            input_ids, images, attention_mask=attention_mask, image_features=image_features, padding_side="left"
        )
        settings = kwargs.get("generation_config")
        max_length = kwargs.pop("max_length", getattr(settings, "max_length", None))
        if kwargs.get("max_new_tokens", getattr(settings, "max_new_tokens", None)) is None:
            # A length in ids, as callers count it, or the end of the context; the library would count patches too.
            room = self.config.max_position_embeddings - fused.inputs_embeds.shape[1]
            kwargs["max_new_tokens"] = room if max_length is None else max(max_length - input_ids.shape[1], 1)
        if kwargs.get("use_cache", True) and not kwargs.keys() & {"past_key_values", "cache_implementation"}:
            kwargs["past_key_values"] = make_cache(self.config.num_hidden_layers)
        # Logits processors index the vocabulary with the prompt ids, so -200 cannot stay in them.
        text_ids = input_ids.masked_fill(input_ids == IMAGE_TOKEN_INDEX, 0)
        output = super().generate(
            text_ids, inputs_embeds=fused.inputs_embeds, attention_mask=fused.attention_mask, **kwargs
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = len(sequences) // len(input_ids)
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(copies, dim=0)
        return output

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> "YiVLForCausalLM":
        """Load a local checkpoint folder; the ViT in ``vit/`` takes precedence over the copy in the main files.

        Args:
            folder: A local folder.
            **kwargs: Of ``PreTrainedModel.from_pretrained`` (``dtype``, ``device_map``, ``config``, ...), and:
                ``bits``: 8 or 4 quantize with bitsandbytes;
                ``image_size``: side of the ViT input in pixels, to which the position embeddings are interpolated;
                ``vit_weights``: a state dict that replaces the ViT in ``vit/``;
                ``fresh_projector``: initialize the projector at random if the folder, that of a language model, has
                none.

        Raises:
            CheckpointError: If a file is missing or damaged, or keys are missing, unexpected or of a wrong shape.
        """
        from yivl.checkpoint.loading import load_pretrained  # the one import from a layer above

        return load_pretrained(super().from_pretrained, folder, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a checkpoint atomically; see ``yivl.checkpoint.saving.save_checkpoint``.

        Args:
            save_directory: Replaced if it holds a checkpoint.
            is_main_process: Only rank 0 of a distributed run writes.
            **kwargs: Of ``save_checkpoint``.
        """
        from yivl.checkpoint.saving import save_checkpoint  # as above

        if is_main_process:
            save_checkpoint(self, save_directory, **kwargs)
