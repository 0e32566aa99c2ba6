"""The configuration of an InternVL-Chat checkpoint: nested in its ``config.json``, flat in memory as that of Yi-VL.

Source of all fields and defaults: OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/configuration_*.py.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from yivl.conversation import HERMES_2, PromptTemplate
from yivl.errors import CheckpointError
from yivl.model.configuration import YiVLConfig, fields_for
from yivl.model.projector import PixelShuffleProjector

# Fields of llm_config that a model depends on; its other fields are those of every configuration of transformers 4.
_TEXT: Final = (
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "vocab_size"),
)
# Those of YiVLConfig.published_text_fields.
_MORE_TEXT: Final = ("rope_theta", "rope_scaling", "head_dim", "mlp_bias")
# The defaults of the classes are the sizes of other models.
_REQUIRED_TEXT: Final = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
)
_REQUIRED_VISION: Final = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "image_size", "patch_size"),
)


@strict
class InternVisionConfig(PreTrainedConfig):
    """Fields of ``vision_config``, with the defaults of the original.

    ``use_flash_attn`` is no field: the attention implementation is that of the process.
    """

    model_type = "intern_vit_6b"

    hidden_size: int = 3200
    intermediate_size: int = 12800
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    norm_type: str = "rms_norm"
    """Other values are refused, as those of ``qkv_bias`` and ``qk_normalization``: no ViT of V1-2 has them."""
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    """RMSNorm of queries and keys over the whole width, before the split into heads."""
    dropout: int | float = 0.0
    """Of the output of attention."""
    attention_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.0
    """Stochastic depth of the last layer in training; it grows linearly from 0 at the first layer."""
    initializer_range: float = 0.02
    initializer_factor: float = 0.1
    """Initial value of layer scale."""

    def validate_architecture(self) -> None:
        """Refuse fields that contradict each other; ``strict`` calls it."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a divisor of hidden_size, "
                f"{self.hidden_size}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size is {self.patch_size}; expected at most image_size, {self.image_size}")
        for name, expected in (("norm_type", "rms_norm"), ("qkv_bias", False), ("qk_normalization", True)):
            if getattr(self, name) != expected:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected!r}, that of InternViT-6B")
        for name in ("dropout", "attention_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and less than 1")


@strict
class InternVLConfig(YiVLConfig):
    """Fields of an InternVL-Chat checkpoint: those of ``llm_config`` flat, as in ``YiVLConfig``, and its own.

    Raises:
        CheckpointError: If a field has a value this code does not support.
    """

    model_type = "internvl_chat"
    saved_vision_widths = 14
    sub_configs = {"vision_config": InternVisionConfig}  # noqa: RUF012 (a transformers class attribute)

    mm_projector_type: str = "internvl_mlp1"
    """``build_projector`` has no other. Source: ours."""
    mm_hidden_size: int = 3200
    mm_vision_select_layer: int = -1
    """``select_layer`` of the file."""
    image_aspect_ratio: str = "squash"
    """``squash``, or ``pad`` where the file says ``pad2square``."""
    downsample_ratio: int | float = 0.5
    """Side of the grid of image tokens over that of the grid of patches."""
    ps_version: str = "v1"
    """``v1`` transposes the grid of image tokens, ``v2`` does not."""
    template: str = "Hermes-2"
    system_message: str | None = None
    """Replaces the system message of the template."""
    published: Any = None
    """``config.json`` as it was read, for ``to_published_dict``."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = False  # the original forces that, whatever the file says
        if self.mm_projector_type != type(self).mm_projector_type:
            raise CheckpointError(
                f"mm_projector_type={self.mm_projector_type!r}; expected {type(self).mm_projector_type!r}, that of an "
                "InternViT"
            )
        if self.mm_vision_select_feature != "patch":
            raise CheckpointError(
                f"mm_vision_select_feature={self.mm_vision_select_feature!r}; expected 'patch': the class token has no "
                "place in the grid of image tokens"
            )
        if self.ps_version not in ("v1", "v2"):
            raise CheckpointError(f"ps_version is {self.ps_version!r}; expected 'v1' or 'v2'")
        if self.template != "Hermes-2":
            raise CheckpointError(f"template is {self.template!r}; expected 'Hermes-2', that of InternVL-Chat-V1-2")
        if not 0 < self.downsample_ratio <= 1 or round(1 / self.downsample_ratio) * self.downsample_ratio != 1:
            raise CheckpointError(f"downsample_ratio is {self.downsample_ratio}; expected one over an integer, as 0.5")
        if isinstance(self.vision_config, PreTrainedConfig):
            self.num_patches_at(self.vision_config.image_size)

    @property
    def prompt_template(self) -> PromptTemplate:
        """Hermes-2, with the system message of the file if it has one."""
        return HERMES_2 if self.system_message is None else replace(HERMES_2, system=self.system_message)

    @property
    def block_size(self) -> int:
        """Patches per side of the square block that becomes one image token: 2 for the released model."""
        return round(1 / self.downsample_ratio)

    def num_patches_at(self, image_size: int) -> int:
        """Return the image tokens per image of ``image_size`` pixels a side: 256 at 448.

        Raises:
            CheckpointError: If the grid of patches cannot be divided into blocks.
        """
        side = image_size // self.vision_config.patch_size
        if side % self.block_size:
            raise CheckpointError(
                f"image size {image_size} has {side} x {side} patches; expected a multiple of {self.block_size} per "
                f"side, as downsample_ratio is {self.downsample_ratio}"
            )
        return int(side // self.block_size) ** 2

    def build_projector(self) -> nn.Module:
        """Return ``mlp1``, with pixel shuffle before it."""
        return PixelShuffleProjector(
            self.mm_hidden_size, self.hidden_size, self.block_size, transposed=self.ps_version == "v1"
        )

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "InternVLConfig":
        """Return the configuration of the fields of a ``config.json``.

        ``use_flash_attn`` and ``attn_implementation`` choose kernels of a process and are ignored, as for Yi-VL.

        Args:
            fields: Of the published layout, with ``llm_config`` and ``vision_config``.

        Raises:
            CheckpointError: If a field is missing, or the file describes another kind of InternVL.
        """
        text, vision = _part(fields, "llm_config", _REQUIRED_TEXT), _part(fields, "vision_config", _REQUIRED_VISION)
        if text.get("model_type", "llama") != "llama":
            raise CheckpointError(f"llm_config.model_type is {text['model_type']!r}; expected 'llama'")
        if fields.get("select_layer") is None:
            raise CheckpointError("no select_layer: its default changed between versions of InternVL")
        if fields.get("dynamic_image_size"):
            raise CheckpointError("dynamic_image_size is true; expected false: InternVL-Chat-V1-2 has no image tiles")
        size = fields.get("force_image_size")
        if size not in (None, vision["image_size"]):
            raise CheckpointError(
                f"force_image_size is {size}; expected that of the ViT, {vision['image_size']}: change it here, and "
                "choose another image size by a flag"
            )
        known: dict[str, Any] = {name: text[name] for name in (*_TEXT, *_MORE_TEXT) if name in text}
        known["torch_dtype"] = fields.get("torch_dtype") or text.get("torch_dtype")
        own = {name: fields.get(name) for name in ("downsample_ratio", "ps_version", "template", "system_message")}
        vision_names = {field.name for field in dataclasses.fields(InternVisionConfig)} - {"dtype"}
        vision = {name: value for name, value in vision.items() if name in vision_names}
        return cls(
            **fields_for(cls, known | own),
            vision_config=InternVisionConfig(**fields_for(InternVisionConfig, vision)),
            mm_hidden_size=vision["hidden_size"],
            mm_vision_select_layer=fields["select_layer"],
            image_aspect_ratio="pad" if fields.get("pad2square") else "squash",
            published=copy.deepcopy(dict(fields)),
        )

    def to_published_dict(self) -> dict[str, Any]:
        """Return the fields of ``config.json``: those that were read, with the values of this configuration.

        ``llm_config.attn_implementation`` is left out: the original obeys it, and fails without FlashAttention.

        Raises:
            CheckpointError: If the published layout cannot express how images are made square.
        """
        if self.image_aspect_ratio not in ("squash", "pad"):
            raise CheckpointError(
                f"image_aspect_ratio={self.image_aspect_ratio!r} has no name in the format of InternVL; expected "
                "'squash' or 'pad'"
            )
        fields = copy.deepcopy(self.published or {})
        text = fields.get("llm_config", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
        text.pop("attn_implementation", None)
        text |= {name: getattr(self, name) for name in _TEXT}
        text |= {**self.published_text_fields(), "tie_word_embeddings": False}
        new_vision = {"architectures": ["InternVisionModel"], "model_type": InternVisionConfig.model_type}
        vision = fields.get("vision_config", new_vision)
        vision |= {name: getattr(self.vision_config, name) for name in InternVisionConfig.__annotations__}
        fields |= {
            "architectures": ["InternVLChatModel"],
            "model_type": self.model_type,
            "llm_config": text,
            "vision_config": vision,
            "hidden_size": self.hidden_size,
            "force_image_size": self.vision_config.image_size,
            "select_layer": self.mm_vision_select_layer,
            "pad2square": self.image_aspect_ratio == "pad",
            "dynamic_image_size": False,
            "downsample_ratio": self.downsample_ratio,
            "ps_version": self.ps_version,
            "template": self.template,
            "tie_word_embeddings": False,
            "torch_dtype": self.published_dtype,
            # In memory, adapters are merged or separate from the model.
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
        }
        fields.pop("system_message", None)
        return fields | ({} if self.system_message is None else {"system_message": self.system_message})


def _part(fields: Mapping[str, Any], name: str, required: tuple[str, ...]) -> dict[str, Any]:
    """Return a nested configuration.

    Raises:
        CheckpointError: If it is missing, or has no field of ``required``.
    """
    part = fields.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(f"no {name}; this is not an InternVL-Chat checkpoint")
    if missing := [field for field in required if part.get(field) is None]:
        raise CheckpointError(f"{name} has no {missing[0]}")
    return part
