"""The configuration of a Yi-VL checkpoint: Llama fields, ``mm_*`` fields, and the ViT's own configuration."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar, Final, get_type_hints

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedConfig

from yivl.conversation import YI_VL, PromptTemplate
from yivl.errors import CheckpointError
from yivl.files.schema import SamplingFields
from yivl.files.validation import check_value, library_errors
from yivl.model.projector import build_projector

logger = logging.getLogger(__name__)

# Fields of transformers or of this process that a checkpoint does not record, or under another name.
_UNPUBLISHED: Final = (
    "vision_config",
    "rope_parameters",
    "head_dim",  # unless it is unusual, as mlp_bias
    "mlp_bias",
    "dtype",
    "use_cache",
    "_name_or_path",  # a local path
)
# Of old versions of transformers, which become other fields.
_LEGACY: Final = ("rope_scaling", "torch_dtype")
_DTYPES: Final = {"dtype", "torch_dtype"}
_OF_A_PROCESS: Final = (
    *("attn_implementation", "experts_implementation", "output_attentions", "per_layer_config"),
    *("quantization_config", "transformers_weights"),
)


def fields_for(kind: type[PreTrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file that a configuration takes.

    Left out are those that would replace a method or a property of the class, or that are about a process and no model:
    the attention implementation, for example, may name a kernel that transformers downloads and runs. Null where the
    class has another default, and the dtype ``auto``, stand for an absent field; a null id is none.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    known = defaults.keys() | set(_LEGACY)
    taken = {
        name: value
        for name, value in fields.items()
        if name in known or not (name.startswith("_") or name in _OF_A_PROCESS or hasattr(kind, name))
    }
    for name in _DTYPES & taken.keys():
        taken[name] = None if taken[name] in (None, "auto") else str(taken[name]).removeprefix("torch.")
    return {
        name: value
        for name, value in taken.items()
        if value is not None or name.endswith("_id") or defaults.get(name) is None
    }


def generation_config(fields: Mapping[str, Any], source: str | os.PathLike[str]) -> GenerationConfig:
    """Return generation settings; sampling that is wrong or unknown to transformers is left out, with a warning.

    Answers are sampled by flags, so that such a setting is no reason to refuse a checkpoint.

    Args:
        fields: Of a ``generation_config.json``, its ids checked.
        source: Of the fields, for the messages.

    Raises:
        CheckpointError: If transformers refuses what is left.
    """
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    types = get_type_hints(SamplingFields, include_extras=True)
    kept = {}
    for name in sorted(known & fields.keys()):
        try:
            check_value(source, name, fields[name], types.get(name, Any))
            with library_errors(f"{source}: {name}"):
                GenerationConfig(**{name: fields[name]})
            kept[name] = fields[name]
        except CheckpointError as error:
            logger.warning("%s; the setting is ignored, flags decide how answers are sampled", error)
    with library_errors(source):
        return GenerationConfig(**kept)


@strict
class YiVLConfig(LlamaConfig):
    """Fields of ``config.json`` plus ``vision_config``, the configuration of the ViT.

    ``model_type`` is ``llava``, as in the released checkpoints. transformers has another class of that type, so this
    class is never looked up through ``AutoConfig``. Unknown fields (``moe_mode``, ...) are kept.

    Raises:
        CheckpointError: If a field has a value this code does not support.
    """

    model_type = "llava"
    saved_vision_widths: ClassVar[int] = 12
    """Activations that a ViT layer saves per position under autocast, beside two of the MLP, in widths of the ViT."""
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012 (a transformers class attribute)

    vision_config: Any = None
    """The configuration of the ViT, or its fields."""
    mm_vision_tower: str = ""
    """Folder of the ViT, relative to the checkpoint (``./vit/<name>``)."""
    mm_projector_type: str = "mlp2x_gelu_Norm"
    mm_hidden_size: int = 1280
    """Width of the ViT features. Source: 01-ai/Yi-VL-6B, config.json."""
    mm_vision_select_layer: int = -2
    """Hidden state of the ViT that feeds the projector; 0 is the embedding, -1 the last layer."""
    mm_vision_select_feature: str = "patch"
    """``patch`` drops the class token, ``cls_patch`` keeps it."""
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    image_aspect_ratio: str = "pad"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = self.sub_configs["vision_config"](**self.vision_config)
        super().__post_init__(**kwargs)
        self._check_shapes()
        if self.mm_vision_select_feature not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"mm_vision_select_feature={self.mm_vision_select_feature!r}; expected 'patch' or 'cls_patch'"
            )
        if self.mm_use_im_start_end or self.mm_use_im_patch_token:
            raise CheckpointError("mm_use_im_start_end and mm_use_im_patch_token are not supported: Yi-VL has neither")

    def _check_shapes(self) -> None:
        """Refuse fields that contradict each other; transformers compares the width with the number of heads."""
        vision = self.vision_config
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_key_value_heads is {self.num_key_value_heads}; expected a divisor of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"the width of a head is {self.head_dim}; expected an even number, as RoPE needs")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(
                f"pad_token_id is {self.pad_token_id}; expected less than vocab_size, {self.vocab_size}"
            )
        if isinstance(vision, PreTrainedConfig) and vision.hidden_size != self.mm_hidden_size:
            raise CheckpointError(
                f"mm_hidden_size is {self.mm_hidden_size}; expected that of the ViT, {vision.hidden_size}"
            )

    def build_projector(self) -> nn.Module:
        """Return the projector with random weights; other configurations have other projectors."""
        return build_projector(self.mm_projector_type, self.mm_hidden_size, self.hidden_size)

    @property
    def prompt_template(self) -> PromptTemplate:
        """How conversations with the model are written."""
        return YI_VL

    @property
    def num_vision_positions(self) -> int:
        """Positions per image in the ViT, class token included: 1,025 for the released models."""
        return int(self.vision_config.image_size // self.vision_config.patch_size) ** 2 + 1

    @property
    def num_patches(self) -> int:
        """Image tokens per image in the decoder: 1,024 for the released models."""
        return self.num_patches_at(self.vision_config.image_size)

    def num_patches_at(self, image_size: int) -> int:
        """Return the image tokens per image of ``image_size`` pixels a side; a run may change the size."""
        side = image_size // self.vision_config.patch_size
        return int(side * side + (self.mm_vision_select_feature == "cls_patch"))

    @property
    def num_vision_layers(self) -> int:
        """ViT layers that run: all up to ``mm_vision_select_layer``.

        Raises:
            CheckpointError: If the ViT has no such hidden state.
        """
        layers: int = self.vision_config.num_hidden_layers
        index = self.mm_vision_select_layer + (layers + 1 if self.mm_vision_select_layer < 0 else 0)
        if not 0 <= index <= layers:
            raise CheckpointError(f"mm_vision_select_layer={self.mm_vision_select_layer} of a ViT with {layers} layers")
        return index

    def to_published_dict(self) -> dict[str, Any]:
        """Return the fields of ``config.json``, with ``rope_theta`` for old versions of transformers."""
        fields = {key: value for key, value in self.to_dict().items() if key not in _UNPUBLISHED}
        return fields | {
            "architectures": ["LlavaLlamaForCausalLM"],  # Source: 01-ai/Yi-VL-6B, config.json
            "model_type": self.model_type,
            "mm_vision_tower": f"./vit/{self.vit_name}",
            **self.published_text_fields(),
            "torch_dtype": self.published_dtype,
            "use_cache": True,
        }

    def published_text_fields(self) -> dict[str, Any]:
        """Return the fields of the language model that old versions of transformers have elsewhere, or not at all."""
        rope = dict(self.rope_parameters)
        kind = rope.pop("rope_type", "default")
        fields = {
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        }
        if self.head_dim != self.hidden_size // self.num_attention_heads:
            fields["head_dim"] = self.head_dim
        if self.mlp_bias:
            fields["mlp_bias"] = True
        return fields

    @property
    def published_dtype(self) -> str:
        """``torch_dtype`` of the weights, without its module."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    @property
    def vit_name(self) -> str:
        """Name of the ViT folder below ``vit/``."""
        return PurePosixPath(self.mm_vision_tower).name or "clip-vit"
