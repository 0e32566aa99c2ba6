"""The known fields of the JSON files of checkpoints: types and limits, which are checked before any library reads them.

Fields that no schema names are not checked. Null stands for an absent field, except for shapes, which are required. The
limits are far above those of published models: they keep a damaged file from allocating memory or running for hours.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired, TypedDict, is_typeddict

from yivl.files.run_schema import ArgumentFields, RunFields, SourceFields, StateFields
from yivl.files.validation import (
    Number,
    check_fields,
    check_value,
    empty,
    file_names,
    known_activation,
    known_rope,
    one_of,
    short,
    within,
)

_WIDTH: Final = 2**17
_LAYERS: Final = 1_000
_IMAGE_SIDE: Final = 8_192
_VOCABULARY: Final = 2**24
_DTYPES: Final = ("float64", "float32", "float16", "bfloat16")

Dtype = Annotated[str | None, one_of("auto", *(p + n for p in ("", "torch.") for n in _DTYPES))]
Width = Annotated[int, within(1, _WIDTH)]
Text = Annotated[str | None, short]
TokenId = Annotated[int | None, within(-1, _VOCABULARY)]
TokenIds = Annotated[int | list[int] | None, within(-1, _VOCABULARY)]


class ModelFields(TypedDict, total=False):
    """``config.json`` of a checkpoint, a language model, a ViT, or a model that consists of them."""

    hidden_size: Width
    intermediate_size: Annotated[int, within(1, 2**20)]
    num_hidden_layers: Annotated[int, within(1, _LAYERS)]
    num_attention_heads: Annotated[int, within(1, 1_024)]
    num_key_value_heads: Annotated[int | None, within(1, 1_024)]
    head_dim: Annotated[int | None, within(1, 1_024)]
    vocab_size: Annotated[int, within(1, _VOCABULARY)]
    max_position_embeddings: Annotated[int, within(1, 2**24)]
    rms_norm_eps: Annotated[Number, within(0, 1)]
    layer_norm_eps: Annotated[Number, within(0, 1)]
    initializer_range: Annotated[Number | None, within(0, 1)]
    initializer_factor: Annotated[Number | None, within(0, 1_000)]
    attention_dropout: Annotated[Number | None, within(0, 1)]
    attention_bias: bool | None
    mlp_bias: bool | None
    hidden_act: Annotated[str, known_activation]
    rope_theta: Annotated[Number, within(1, 1e15)]
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any]
    pad_token_id: TokenId
    bos_token_id: TokenId
    eos_token_id: TokenIds
    torch_dtype: Dtype
    dtype: Dtype
    num_labels: Annotated[int, within(0, 2**20)]
    quantization_config: Annotated[dict[str, Any] | None, empty]
    # Of the ViT
    image_size: Annotated[int, within(1, _IMAGE_SIDE)]
    patch_size: Annotated[int, within(1, _IMAGE_SIDE)]
    num_channels: Annotated[int, within(3, 3)]
    projection_dim: Annotated[int | None, within(0, _WIDTH)]
    # Of LLaVA and Yi-VL
    mm_vision_tower: Text
    mm_projector_type: Annotated[str, short]
    mm_hidden_size: Width
    mm_vision_select_layer: Annotated[int, within(-_LAYERS, _LAYERS)]
    mm_vision_select_feature: str
    mm_use_im_start_end: bool | None
    mm_use_im_patch_token: bool | None
    image_aspect_ratio: str | None
    # Of InternVL-Chat and its ViT
    force_image_size: Annotated[int | None, within(1, _IMAGE_SIDE)]
    select_layer: Annotated[int, within(-_LAYERS, _LAYERS)]
    downsample_ratio: Annotated[Number, within(1e-3, 1)]
    ps_version: Annotated[str | None, one_of("v1", "v2")]
    template: Text
    system_message: str | None
    pad2square: bool | None
    dynamic_image_size: bool | None
    norm_type: Annotated[str, one_of("rms_norm")]
    qkv_bias: bool
    qk_normalization: bool
    dropout: Annotated[Number | None, within(0, 1)]
    drop_path_rate: Annotated[Number | None, within(0, 1)]
    # Of the -hf format
    is_yi_vl_derived_model: bool | None


class HfFields(TypedDict):
    """Fields of ``config.json`` that the ``-hf`` format needs."""

    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    vision_feature_layer: Annotated[int, within(-_LAYERS, _LAYERS)]
    vision_feature_select_strategy: Annotated[str, one_of("default", "full")]
    image_token_index: Annotated[int, within(1, _VOCABULARY)]


class RopeFields(TypedDict, total=False):
    """``rope_parameters`` and ``rope_scaling``."""

    rope_type: Annotated[str, known_rope]
    type: Annotated[str, known_rope]
    rope_theta: Annotated[Number, within(1, 1e15)]
    factor: Annotated[Number, within(1, 1e6)]


class PreprocessorFields(TypedDict, total=False):
    """``preprocessor_config.json`` of a ViT."""

    size: Annotated[int | dict[str, int | None], within(1, _IMAGE_SIDE)]
    crop_size: Annotated[int | dict[str, int | None], within(1, _IMAGE_SIDE)]
    image_mean: Annotated[list[Number], within(0, 1, length=3)]
    image_std: Annotated[list[Number], within(1e-6, 1e6, length=3)]
    rescale_factor: Annotated[Number, within(1e-6, 1)]
    resample: Annotated[int, within(0, 5)]
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    do_convert_rgb: bool | None


class TokenizerFields(TypedDict, total=False):
    """``tokenizer_config.json``."""

    add_bos_token: bool | None
    add_eos_token: bool | None
    added_tokens_decoder: dict[str, dict[str, Any]]
    additional_special_tokens: list[str | dict[str, Any]] | None
    extra_special_tokens: list[str | dict[str, Any]] | dict[str, Any] | None
    bos_token: str | dict[str, Any] | None
    eos_token: str | dict[str, Any] | None
    pad_token: str | dict[str, Any] | None
    unk_token: str | dict[str, Any] | None
    clean_up_tokenization_spaces: bool | None
    legacy: bool | None
    model_max_length: Annotated[Number | None, within(1, 1e31)]  # 1e30 is "no limit" in transformers
    padding_side: Annotated[str, one_of("left", "right")]
    sp_model_kwargs: dict[str, Any] | None


class SpecialTokenFields(TypedDict, total=False):
    """``special_tokens_map.json``."""

    additional_special_tokens: list[str | dict[str, Any]] | None
    bos_token: str | dict[str, Any] | None
    eos_token: str | dict[str, Any] | None
    pad_token: str | dict[str, Any] | None
    unk_token: str | dict[str, Any] | None


class GenerationFields(TypedDict, total=False):
    """``generation_config.json``: only what an answer depends on, which is no sampling: its settings are flags."""

    bos_token_id: TokenIds
    eos_token_id: TokenIds
    pad_token_id: TokenIds


class SamplingFields(TypedDict, total=False):
    """Defaults of sampling in ``generation_config.json``; ``generation_config`` leaves wrong ones out."""

    do_sample: bool | None
    temperature: Annotated[Number | None, within(0, 1e6)]
    top_p: Annotated[Number | None, within(0, 1)]
    top_k: Annotated[int | None, within(0, _VOCABULARY)]
    num_beams: Annotated[int | None, within(1, 1_000)]
    repetition_penalty: Annotated[Number | None, within(1e-6, 1e6)]
    max_length: Annotated[int | None, within(1, 2**40)]
    max_new_tokens: Annotated[int | None, within(1, 2**40)]


class IndexFields(TypedDict):
    """Index of a sharded checkpoint."""

    weight_map: Annotated[dict[str, str], file_names]
    metadata: NotRequired[dict[str, Any]]  # only the loader of transformers needs it


class AdapterFields(TypedDict, total=False):
    """``adapter_config.json`` of peft."""

    base_model_name_or_path: Text
    peft_type: str
    r: Annotated[int, within(1, _WIDTH)]
    lora_alpha: Annotated[Number, within(0, 1e6)]
    lora_dropout: Annotated[Number, within(0, 1)]
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    modules_to_save: list[str] | None
    layers_to_transform: int | list[int] | None
    rank_pattern: Annotated[dict[str, int] | None, within(1, _WIDTH)]
    alpha_pattern: dict[str, Number] | None
    bias: Annotated[str, one_of("none", "all", "lora_only")]
    use_rslora: bool | None
    use_dora: bool | None
    fan_in_fan_out: bool | None


class AdapterSettings(TypedDict):
    """``yivl_adapter_config.json``."""

    image_size: Annotated[int, within(1, _IMAGE_SIDE)]
    image_aspect_ratio: Annotated[str, one_of("pad", "square", "squash")]


class OpenClipFields(TypedDict, total=False):
    """``open_clip_config.json``."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


class OpenClipVision(TypedDict):
    """``vision_cfg`` in the configuration of an open_clip model."""

    width: Width
    layers: Annotated[int, within(1, _LAYERS)]
    image_size: Annotated[int, within(1, _IMAGE_SIDE)]
    patch_size: Annotated[int, within(1, _IMAGE_SIDE)]
    head_width: NotRequired[Width]
    mlp_ratio: NotRequired[Annotated[Number, within(1e-3, 1e3)]]


class OpenClipPreprocessing(TypedDict, total=False):
    """``preprocess_cfg`` in the configuration of an open_clip model."""

    mean: Annotated[list[Number] | None, within(0, 1, length=3)]
    std: Annotated[list[Number] | None, within(1e-6, 1e6, length=3)]


class ProcessorFields(TypedDict, total=False):
    """``processor_config.json``."""

    image_processor: dict[str, Any]


class VocabularyFields(TypedDict, total=False):
    """``tokenizer.json``."""

    added_tokens: list[dict[str, Any]]
    model: dict[str, Any]


# By name of file; a schema, or the type of a whole object.
_SCHEMAS: Final[Mapping[str, Any]] = {
    "config.json": ModelFields,
    "preprocessor_config.json": PreprocessorFields,
    "processor_config.json": ProcessorFields,
    "tokenizer_config.json": TokenizerFields,
    "special_tokens_map.json": SpecialTokenFields,
    "added_tokens.json": Annotated[dict[str, int], within(0, _VOCABULARY)],
    "tokenizer.json": VocabularyFields,
    "generation_config.json": GenerationFields,
    "adapter_config.json": AdapterFields,
    "yivl_adapter_config.json": AdapterSettings,
    "training_run.json": RunFields,
    "training_arguments.json": ArgumentFields,
    "trainer_state.json": StateFields,
    "open_clip_config.json": OpenClipFields,
    "published.json": dict[str, dict[str, Any]],
}
# Objects in fields that have a schema of their own.
_NESTED: Final[Mapping[str, Any]] = {
    "text_config": ModelFields,
    "llm_config": ModelFields,
    "vision_config": ModelFields,
    "rope_parameters": RopeFields,
    "rope_scaling": RopeFields,
    "image_processor": PreprocessorFields,
}


def without_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose value is not null."""
    return {name: value for name, value in fields.items() if value is not None}


def check_file(path: Path, fields: Mapping[str, Any]) -> None:
    """Check the known fields of a JSON file, which its name tells, and of the objects in it.

    Raises:
        CheckpointError: As ``check_fields``.
    """
    schema = IndexFields if path.name.endswith(".index.json") else _SCHEMAS.get(path.name)
    if schema is None:
        return
    if not is_typeddict(schema):
        check_value(path, "its content", fields, schema)
    else:
        check_fields(path, fields, schema)
    if path.name == "published.json":
        for name, content in fields.items():
            check_file(path / name, content)
    if path.name == "training_run.json":
        for source in fields.get("sources", []):
            check_fields(f"{path}: sources", source, SourceFields)
    _check_nested(path, fields)


def _check_nested(source: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    for name, schema in _NESTED.items():
        if isinstance(fields.get(name), dict):
            check_fields(f"{source}: {name}", fields[name], schema)
            _check_nested(f"{source}: {name}", fields[name])
