"""Small models built by tests."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from support import golden_internvl
from support.golden import CHECKPOINT
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.checkpoint.saving import save_checkpoint
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM

OPEN_CLIP_VISION = {"width": 160, "layers": 3, "head_width": 80, "patch_size": 14, "image_size": 56}
"""``vision_cfg`` of a small open_clip model."""
VIT = "vit/clip-vit-tiny-random-yi-vl-56"


ARCHITECTURES = {"Yi-VL": CHECKPOINT, "InternVL": golden_internvl.CHECKPOINT}
"""The golden checkpoint of each."""


def load_golden(architecture: str) -> LoadedModel:
    """Load a golden checkpoint in float32; the answers of InternVL, which end early, end with their lengths."""
    loaded = load_model(ARCHITECTURES[architecture], device="cpu")
    if architecture == "InternVL":
        with torch.no_grad():
            loaded.model.lm_head.weight[loaded.tokenizer.eos_token_id] = 0
    return loaded


def talkative_checkpoint(folder: Path) -> Path:
    """Save the golden model, changed so that neither stop string nor end of text ever leads: its answers are long."""
    loaded = load_model(CHECKPOINT, device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight[[294, 710, loaded.tokenizer.eos_token_id]] = 0
    processor = loaded.image_processor.clip_processor
    save_checkpoint(loaded.model, folder, tokenizer=loaded.tokenizer, image_processor=processor)
    return folder


def wide_checkpoint(folder: Path) -> Path:
    """Save a model with random weights whose layers are wide enough for 4 bits on a CPU."""
    vision = CLIPVisionConfig.from_pretrained(CHECKPOINT / VIT)
    config = YiVLConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mm_hidden_size=48,
        mm_vision_tower="./vit/tiny",
        vision_config=vision,
        max_position_embeddings=4096,
    )
    model = YiVLForCausalLM(config)
    source = load_model(CHECKPOINT, device="cpu")
    save_checkpoint(model, folder, tokenizer=source.tokenizer, image_processor=source.image_processor.clip_processor)
    return folder
