"""YiVLForCausalLM: vision tower, projector and fusion in front of the Llama decoder of transformers.

Image features reach the decoder as ``inputs_embeds``; its cache, attention and generation are those of the library.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.errors import ContextLengthError
from yivl.model.configuration import YiVLConfig
from yivl.model.decoder import DecoderLayer
from yivl.model.fusion import Fused, PaddingSide, cover_cache, expand_placeholders, merge_features
from yivl.model.loss import supervised_loss
from yivl.model.sharding import is_sharded
from yivl.model.vision_tower import Images, VisionTower, stack_images


class ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary position embeddings whose frequencies stay in float32 when the model is cast.

    Callers cast the loaded model, ``model.to(dtype=torch.bfloat16)``. transformers 5 computes the cosines from the
    frequencies, which in bfloat16 are off by up to 0.4 %: with the released shapes that is one radian at position
    1,100, where the question after an image stands. transformers 4 had the cosines computed before the cast.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ExactRotaryEmbedding":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in exact.items():
            cast = getattr(self, name)
            if cast.dtype != frequencies.dtype:
                setattr(self, name, frequencies.to(cast.device))
        return self


class YiVLModel(LlamaModel):
    """The Llama decoder, vision tower and projector, under the key names of the checkpoint."""

    config: YiVLConfig

    def __init__(self, config: YiVLConfig) -> None:
        super(LlamaModel, self).__init__(config)  # not its own __init__, which would build other layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        # Tower and projector come first: a device map that exceeds the GPU memory then offloads decoder layers. The
        # names of all modules are checkpoint keys.
        self.vision_tower = VisionTower(config)
        self.mm_projector = config.build_projector()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ExactRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class YiVLForCausalLM(LlamaForCausalLM):
    """Yi-VL. State-dict names are those of the published checkpoints."""

    config: YiVLConfig
    _no_split_modules = ["DecoderLayer", "VisionTower"]  # noqa: RUF012 (a transformers class attribute)

    def __init__(self, config: YiVLConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not its own __init__, which would build a plain decoder
        self.model = YiVLModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_vision_tower(self) -> VisionTower:
        """Return the vision tower. The name is that of LLaVA."""
        tower: VisionTower = self.model.vision_tower
        return tower

    def resize_images(self, image_size: int) -> None:
        """Set the input resolution to ``image_size`` pixels and interpolate the position embeddings of the ViT.

        Raises:
            ValueError: If ``image_size`` is not a multiple of the patch size, or its patches make no image tokens.
        """
        self.config.num_patches_at(image_size)
        self.get_vision_tower().resize(image_size)

    def encode_images(self, images: Images) -> torch.Tensor:
        """Return projected features, ``(num_images, num_patches, hidden)``.

        Raises:
            ValueError: If the size of an image differs from the input resolution of the ViT.
        """
        weight = self.model.vision_tower.vit.embeddings.class_embedding
        # The weights of an offloaded tower are on the meta device; its hooks move the pixels.
        device = None if weight.device.type == "meta" else weight.device
        pixel_values = stack_images(images).to(device=device, dtype=weight.dtype)
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
            images: One image per placeholder, in order over the whole batch.
            attention_mask: ``(batch, seq)``, 0 at padding; ``None`` means no padding, whatever the ids are.
            labels: ``(batch, seq)`` int64.
            image_features: ``(num_images, num_patches, hidden)`` instead of ``images``, already projected.
            row_lengths: ``(num_rows,)`` int64: ``input_ids`` is one sequence of packed rows of that many ids each.
            padding_side: Side on which the fused rows are padded.

        Raises:
            ValueError: If placeholders and images differ in number, or images have another size than the model's.
        """
        num_patches: int = self.config.num_patches
        expanded = expand_placeholders(
            input_ids, num_patches, attention_mask=attention_mask, labels=labels, padding_side=padding_side
        )
        text_ids = expanded.input_ids.masked_fill(expanded.input_ids == IMAGE_TOKEN_INDEX, 0)
        # A device map may place the embeddings on another device than the ViT, which is that of the ids.
        text_embeds: torch.Tensor = self.get_input_embeddings()(text_ids).to(text_ids.device)
        if image_features is None and images is not None and len(images):
            image_features = self.encode_images(images)
        if image_features is None:
            image_features = text_embeds.new_zeros(0, num_patches, text_embeds.shape[-1])
        if image_features.shape[1] != num_patches:
            raise ValueError(f"images of {image_features.shape[1]} tokens; the model has {num_patches} per image")
        inputs_embeds = merge_features(expanded.input_ids, text_embeds, image_features)
        if not len(image_features):
            inputs_embeds = self._dummy_vision_forward(inputs_embeds)
        if row_lengths is None:
            return Fused.from_rows(inputs_embeds, expanded)
        return Fused.from_packed(inputs_embeds, expanded, input_ids, row_lengths, num_patches)

    def _dummy_vision_forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Add a zero that depends on tower and projector where a batch without images needs one.

        All ranks must run the same modules in the same order: under ZeRO-3 and FSDP2 a rank whose batch has no image
        would otherwise gather other weights than the rest, and all ranks would hang. Trainable vision parameters must
        get gradients of zero instead of none on one rank too, so that a step does not depend on the number of ranks:
        the optimizer moves a parameter with a zero gradient by its momentum and skips one without a gradient.
        """
        vision = (self.model.vision_tower, self.model.mm_projector)
        is_trained = self.training and any(weight.requires_grad for module in vision for weight in module.parameters())
        if not is_trained and not is_sharded(self.model.vision_tower.vit.layers[0]):
            return inputs_embeds
        size = self.config.vision_config.image_size
        zero = self.encode_images(torch.zeros(1, 3, size, size)).float().sum() * 0
        return inputs_embeds + zero.to(inputs_embeds)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        images: Images | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        row_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, with labels, the loss.

        Args:
            input_ids: ``(batch, seq)`` int64 with ``-200`` at image slots.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: Rotary positions, ``(batch, fused)``; by default the number of preceding real tokens.
            past_key_values: Key-value cache of transformers.
            inputs_embeds: ``(batch, fused, hidden)`` instead of ``input_ids``.
            labels: ``(batch, seq)`` int64, ``IGNORE_INDEX`` where no loss is computed.
            images: One image per placeholder. Ignored by one-token steps with a cache, as in LLaVA.
            logits_to_keep: Number of last positions, or the positions, whose logits are computed; 0 means all.
            skip_logits: Compute no logits beside the loss, which needs them only where a label is.
            num_items_in_batch: Supervised tokens of the optimizer step, the divisor of the loss.
            row_lengths: ``(num_rows,)`` int64: ``input_ids`` is one sequence of packed rows of that many ids each.
            **kwargs: Arguments of the Llama decoder, such as ``use_cache`` and ``output_hidden_states``.

        Raises:
            ValueError: If placeholders and images differ in number, or images follow a filled cache.
        """
        if input_ids is not None and past_key_values is not None and input_ids.shape[1] == 1 and labels is None:
            attention_mask = cover_cache(attention_mask, past_key_values)
        elif input_ids is not None and (past_key_values is None or not past_key_values.get_seq_length()):
            fused = self.fuse(input_ids, images, attention_mask=attention_mask, labels=labels, row_lengths=row_lengths)
            input_ids, inputs_embeds, labels = None, fused.inputs_embeds, fused.labels
            attention_mask, kwargs = fused.attention_mask, kwargs | fused.packed_kwargs()
            position_ids = fused.position_ids if position_ids is None else position_ids
        elif input_ids is not None and images is not None:
            raise ValueError("images cannot follow a filled cache; pass the whole sequence to generate() instead")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            loss=None if labels is None else supervised_loss(hidden_states, labels, self.lm_head, num_items_in_batch),
            logits=None if skip_logits else self.lm_head(hidden_states[:, kept]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after a prompt with ``-200`` at image slots; the result starts with the prompt ids as given.

        Args:
            inputs: ``(batch, seq)`` int64; may also be passed as ``input_ids``.
            images: One image per placeholder, in order over the whole batch.
            attention_mask: ``(batch, seq)``; ``None`` means no padding, whatever the ids are.
            image_features: ``(num_images, num_patches, hidden)`` instead of ``images``.
            **kwargs: Arguments of ``GenerationMixin.generate``. With ``past_key_values`` the prompt is the whole
                sequence, of which only what the cache does not hold is computed.

        Raises:
            ValueError: If there are no ids, or placeholders and images differ in number.
            ContextLengthError: If the prompt fills the context.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        fused = self.fuse(
            input_ids, images, attention_mask=attention_mask, image_features=image_features, padding_side="left"
        )
        room = self.config.max_position_embeddings - fused.inputs_embeds.shape[1]
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {fused.inputs_embeds.shape[1]:,} positions, image tokens included; expected less than "
                f"{self.config.max_position_embeddings:,}"
            )
        settings = kwargs.get("generation_config")
        max_length = kwargs.pop("max_length", getattr(settings, "max_length", None))
        if kwargs.get("max_new_tokens", getattr(settings, "max_new_tokens", None)) is None:
            # Callers count ids; transformers would count image patches too. The default is the rest of the context.
            kwargs["max_new_tokens"] = room if max_length is None else max(max_length - input_ids.shape[1], 1)
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
            folder: A local folder; ``yivl.mm_utils.load_pretrained_model`` takes hub ids, too.
            **kwargs: Of ``PreTrainedModel.from_pretrained`` (``dtype``, ``config``, ..., and ``device_map``, whose
                names are those in memory or in the files), and:
                ``bits``: 8 or 4 quantize with bitsandbytes;
                ``image_size``: side of the ViT input in pixels, to which the position embeddings are interpolated;
                ``vit_weights``: a state dict that replaces the ViT in ``vit/``;
                ``fresh_projector``: initialize the projector at random if the folder, that of a language model, has
                none.

        Raises:
            CheckpointError: If a file is missing or damaged, keys are missing, unexpected or of a wrong shape, or the
                checkpoint is one of another class.
            YiVLError: If an argument is one of another loader, or a device map names no module of the model.
        """
        from yivl.checkpoint.loading import load_pretrained  # the one import from a layer above

        return load_pretrained(cls, super().from_pretrained, folder, **kwargs)

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
