"""Names, shapes and sizes of the published models, on the meta device."""

import json

import torch
from support.golden import CHECKPOINT, GOLDEN
from transformers import CLIPVisionConfig

from yivl.checkpoint.folder import read_config
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM

PUBLISHED = GOLDEN / "yi-vl-34b"


def published_config() -> YiVLConfig:
    return read_config(PUBLISHED)


def test_the_34b_state_dict_has_the_published_names_and_size() -> None:
    index = json.loads((PUBLISHED / "pytorch_model.bin.index.json").read_text())
    with torch.device("meta"):
        state_dict = YiVLForCausalLM(published_config()).state_dict()
    assert len(index["weight_map"]) == 1070
    assert state_dict.keys() == index["weight_map"].keys()
    # Two bytes per parameter: the published total also pins the shapes.
    assert sum(tensor.numel() for tensor in state_dict.values()) * 2 == index["metadata"]["total_size"] == 70162529280
    assert state_dict["model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"].shape == (
        1025,
        1280,
    )
    assert state_dict["model.mm_projector.0.weight"].shape == (7168, 1280)
    assert state_dict["model.layers.59.self_attn.k_proj.weight"].shape == (1024, 7168)


def test_the_6b_shape_has_the_published_number_of_parameters() -> None:
    """Source of the 6B fields: 01-ai/Yi-VL-6B, config.json."""
    fields = json.loads((PUBLISHED / "config.json").read_text())
    fields |= {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tune_vision_tower": False,
        "mm_vision_tower": "./vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448",
    }
    fields.pop("model_type")
    with torch.device("meta"):
        model = YiVLForCausalLM(YiVLConfig(**fields, vision_config=published_config().vision_config))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_714_829_312


def test_the_published_config_is_read_in_full() -> None:
    config = published_config()
    assert config.num_patches == 1024
    assert config.num_vision_layers == 31
    assert config.rope_parameters["rope_theta"] == 5e6
    assert config.dtype == torch.bfloat16
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert config.vision_config.hidden_act == "gelu"


def test_a_config_is_written_as_it_was_published() -> None:
    for folder in (PUBLISHED, CHECKPOINT):
        published = json.loads((folder / "config.json").read_text())
        written = read_config(folder).to_published_dict()
        changed = {key for key in published if written.get(key, "absent") != published[key]}
        # use_cache: false remains from training; the version is that of this installation.
        assert changed <= {"_name_or_path", "transformers_version", "use_cache"}
        assert "vision_config" not in written
        assert "rope_parameters" not in written
