"""The configuration of InternVL-Chat, and the names and sizes of the published model."""

import copy
import json
from typing import Any

import pytest
import torch
from support.golden_internvl import CHECKPOINT, GOLDEN, published_name
from transformers import GenerationConfig

from yivl.errors import CheckpointError
from yivl.files.validation import library_errors
from yivl.model.architectures import model_class
from yivl.model.configuration import YiVLConfig
from yivl.model.internvl import InternVLChatModel
from yivl.model.internvl_configuration import InternVisionConfig, InternVLConfig
from yivl.model.modeling import YiVLForCausalLM

PUBLISHED = GOLDEN / "internvl-chat-v1-2"
FIELDS = json.loads((CHECKPOINT / "config.json").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    """Return the fields of the golden checkpoint with other values; ``part__name`` is a field of a part."""
    fields = copy.deepcopy(FIELDS)
    for name, value in changes.items():
        *part, name = name.split("__")
        (fields[part[0]] if part else fields)[name] = value
    return fields


def published_config() -> InternVLConfig:
    """Source of the sizes: the README of the golden vectors."""
    fields = changed(
        force_image_size=448,
        hidden_size=7168,
        vision_config={"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45}
        | {"num_attention_heads": 25, "image_size": 448, "patch_size": 14},
        llm_config={"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "vocab_size": 64009}
        | {"num_attention_heads": 56, "num_key_value_heads": 8, "rope_theta": 5e6},
    )
    return InternVLConfig.from_published(fields)


def test_the_published_model_has_its_names_shapes_and_size() -> None:
    counts, shapes = (json.loads((PUBLISHED / f"{name}.json").read_text()) for name in ("counts", "parameters"))
    config = published_config()
    with torch.device("meta"):
        state_dict = model_class(config)(config).state_dict()
    assert len(state_dict) == counts["tensors"] == 1138
    assert {published_name(name): list(value.shape) for name, value in state_dict.items()} == shapes
    assert sum(value.numel() for value in state_dict.values()) == counts["total"] == 40_068_712_832
    assert config.num_patches == counts["num_image_token"] == 256
    assert config.num_vision_layers == 45


def test_the_fields_of_a_checkpoint_are_read() -> None:
    config = InternVLConfig.from_published(FIELDS)
    assert config.num_patches == 9
    assert (config.num_vision_layers, config.mm_hidden_size, config.mm_vision_select_layer) == (4, 48, -1)
    assert (config.ps_version, config.block_size, config.template, config.system_message) == ("v1", 2, "Hermes-2", None)
    assert (config.image_aspect_ratio, config.mm_vision_select_feature) == ("squash", "patch")
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (649, 64, 2)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 7, 0)
    assert config.rope_parameters["rope_theta"] == 5e6
    assert config.dtype == torch.float32
    assert GenerationConfig.from_model_config(config).eos_token_id == 7
    vision = config.vision_config
    assert isinstance(vision, InternVisionConfig)
    assert (vision.norm_type, vision.layer_norm_eps, vision.qk_normalization, vision.qkv_bias) == (
        "rms_norm",
        1e-6,
        True,
        False,
    )


def test_other_values_are_read() -> None:
    fields = changed(
        pad2square=True,
        system_message="Answer the questions.",
        ps_version="v2",
        select_layer=-4,
        downsample_ratio=1 / 3,
    )
    config = InternVLConfig.from_published(fields)
    assert (config.image_aspect_ratio, config.system_message) == ("pad", "Answer the questions.")
    assert (config.ps_version, config.num_vision_layers, config.num_patches) == ("v2", 1, 4)
    assert config.to_published_dict()["system_message"] == "Answer the questions."
    # A release older than ps_version knows v1 only. null is the size of the ViT.
    older = {name: value for name, value in changed(force_image_size=None).items() if name != "ps_version"}
    assert InternVLConfig.from_published(older).ps_version == "v1"


def test_fields_are_written_as_they_were_read() -> None:
    """Also those that nothing here reads. Attention implementations are no part of a model."""
    fields = changed(unknown={"a": [1]}, llm_config__unknown=2, vision_config__unknown=3)
    expected = copy.deepcopy(fields)
    del expected["llm_config"]["attn_implementation"]
    config = InternVLConfig.from_published(fields)
    assert config.to_published_dict() == expected
    assert config._attn_implementation in (None, "sdpa", "eager")
    config.to_published_dict()["llm_config"]["vocab_size"] = 1
    assert config.to_published_dict() == expected
    # What is written is read again, also by json.
    again = InternVLConfig.from_published(json.loads(json.dumps(config.to_published_dict())))
    assert again.to_published_dict() == expected


def test_a_configuration_that_was_not_read_is_written_in_full() -> None:
    vision = InternVisionConfig(
        **{name: FIELDS["vision_config"][name] for name in ("hidden_size", "image_size")} | {"num_attention_heads": 3}
    )
    config = InternVLConfig(vision_config=vision, mm_hidden_size=48, hidden_size=64, num_attention_heads=8)
    written = json.loads(json.dumps(config.to_published_dict()))
    assert written["architectures"] == ["InternVLChatModel"]
    assert written["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    again = InternVLConfig.from_published(written)
    assert again.to_published_dict() == written
    assert (again.hidden_size, again.vision_config.hidden_size) == (64, 48)


def test_changes_are_written() -> None:
    config = InternVLConfig.from_published(changed(use_llm_lora=16))
    config.vocab_size, config.vision_config.image_size, config.dtype = 650, 112, torch.bfloat16
    config.vision_config.drop_path_rate = 0.4
    written = config.to_published_dict()
    assert (written["llm_config"]["vocab_size"], written["torch_dtype"]) == (650, "bfloat16")
    assert (written["force_image_size"], written["vision_config"]["image_size"]) == (112, 112)
    assert written["vision_config"]["drop_path_rate"] == 0.4
    assert written["use_llm_lora"] == 0
    config.image_aspect_ratio = "square"
    with pytest.raises(CheckpointError, match="image_aspect_ratio='square' has no name in the format of InternVL"):
        config.to_published_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_config": None}, "no llm_config; this is not an InternVL-Chat checkpoint"),
        ({"vision_config": None}, "no vision_config; this is not an InternVL-Chat checkpoint"),
        ({"llm_config__hidden_size": None}, "llm_config has no hidden_size"),
        ({"vision_config__image_size": None}, "vision_config has no image_size"),
        ({"select_layer": None}, "no select_layer: its default changed between versions of InternVL"),
        ({"select_layer": -6}, "mm_vision_select_layer=-6 of a ViT with 4 layers"),
        ({"llm_config__model_type": "internlm2"}, "llm_config.model_type is 'internlm2'; expected 'llama'"),
        ({"dynamic_image_size": True}, "dynamic_image_size is true; expected false"),
        ({"force_image_size": 448}, "force_image_size is 448; expected that of the ViT, 84"),
        ({"template": "internlm2-chat"}, "template is 'internlm2-chat'; expected 'Hermes-2'"),
        ({"ps_version": "v3"}, "ps_version is 'v3'; expected 'v1' or 'v2'"),
        ({"downsample_ratio": 0.4}, "downsample_ratio is 0.4; expected one over an integer"),
        ({"downsample_ratio": 0}, "downsample_ratio is 0; expected one over an integer"),
        ({"downsample_ratio": 0.25}, "image size 84 has 6 x 6 patches; expected a multiple of 4 per side"),
        ({"vision_config__norm_type": "batch_norm"}, "norm_type is 'batch_norm'; expected 'rms_norm', that of"),
        ({"vision_config__norm_type": "layer_norm"}, "norm_type is 'layer_norm'; expected 'rms_norm', that of"),
        ({"vision_config__qkv_bias": True}, "qkv_bias is True; expected False, that of InternViT-6B"),
        ({"vision_config__qk_normalization": False}, "qk_normalization is False; expected True, that of InternViT-6B"),
        ({"vision_config__num_attention_heads": 5}, "num_attention_heads is 5; expected a divisor of hidden_size, 48"),
        ({"vision_config__drop_path_rate": 1.0}, "drop_path_rate is 1.0; expected at least 0 and less than 1"),
        ({"llm_config__num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor"),
        ({"vision_config__hidden_size": "48"}, "hidden_size"),
    ],
)
def test_a_configuration_that_fits_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error, library_errors("config.json"):
        _ = InternVLConfig.from_published(changed(**changes)).num_vision_layers
    assert "\n" not in str(error.value)
    assert "Class validation" not in str(error.value)


def test_an_odd_grid_of_patches_is_refused() -> None:
    config = InternVLConfig.from_published(FIELDS)
    with torch.device("meta"):
        model = InternVLChatModel(config)
    with pytest.raises(ValueError, match="image size 70 has 5 x 5 patches; expected a multiple of 2 per side"):
        model.resize_images(70)
    assert config.num_patches == 9


def test_the_class_of_the_model_follows_the_configuration() -> None:
    assert model_class(InternVLConfig.from_published(FIELDS)) is InternVLChatModel
    assert model_class(YiVLConfig()) is YiVLForCausalLM


@pytest.mark.parametrize("fields", [{"head_dim": 16}, {"mlp_bias": True}])
def test_unusual_fields_of_the_language_model_are_written_and_read_again(fields: dict[str, Any]) -> None:
    config = InternVLConfig.from_published(FIELDS)
    for name, value in fields.items():
        setattr(config, name, value)
    written = config.to_published_dict()
    assert fields.items() <= written["llm_config"].items()
    again = InternVLConfig.from_published(written)
    assert {name: getattr(again, name) for name in fields} == fields
    yi_vl = YiVLConfig(hidden_size=64, num_attention_heads=8, **fields)
    assert fields.items() <= yi_vl.to_published_dict().items()
    assert not fields.keys() & YiVLConfig().to_published_dict().keys()


def test_a_system_message_that_is_removed_is_not_written() -> None:
    config = InternVLConfig.from_published(changed(system_message="Old."))
    config.system_message = None
    assert "system_message" not in config.to_published_dict()
