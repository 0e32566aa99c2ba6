"""Randomly initialized models of several shapes, for the benchmark scripts."""

from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
GOLDEN = TESTS / "golden"

TINY_VIT = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 4}
MEDIUM_VIT = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 8}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    # For checks that a script runs.
    "tiny": {
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "image_size": 112,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "small": {
        "vision": TINY_VIT,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 64000,
    },
    "medium": {
        "vision": MEDIUM_VIT,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 64000,
    },
    # The same decoder behind an InternViT, with the vocabulary of InternVL-Chat-V1-2.
    "internvl-medium": {
        "intern_vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
        },
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 64009,
    },
    # Source: 01-ai/Yi-VL-6B, config.json.
    "6b": {
        "vision": VIT_H,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 64000,
    },
    # Source: 01-ai/Yi-VL-34B, config.json.
    "34b": {
        "vision": VIT_H,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
    },
    # Two decoder layers of Yi-VL-6B. A small vocabulary and image leave the cost to them.
    "wide": {
        "vision": TINY_VIT,
        "image_size": 112,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
}


def shape_config(shape: str, dtype: str = "float32", image_size: int | None = None) -> Any:
    """Return the configuration of a shape, by default with its image size in pixels (448 unless it has another)."""
    from transformers import CLIPVisionConfig

    from yivl.model.configuration import YiVLConfig
    from yivl.model.internvl_configuration import InternVisionConfig, InternVLConfig

    fields = dict(SHAPES[shape])
    shape_size = fields.pop("image_size", 448)
    decoder = {"max_position_embeddings": 4096, "rope_theta": 5e6, "rms_norm_eps": 1e-5, "dtype": dtype}
    if "intern_vision" in fields:
        intern_vision = InternVisionConfig(**fields.pop("intern_vision"), image_size=image_size or shape_size)
        return InternVLConfig(
            **fields, **decoder, vision_config=intern_vision, mm_hidden_size=intern_vision.hidden_size
        )
    vision = CLIPVisionConfig(
        **fields.pop("vision"),
        image_size=image_size or shape_size,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    return YiVLConfig(
        **fields,
        **decoder,
        vision_config=vision,
        mm_hidden_size=vision.hidden_size,
        mm_vision_tower="./vit/random",
    )


def random_model(shape: str, dtype: str, device: str = "cpu") -> Any:
    """Return a ``LoadedModel`` with random weights, created on the device, in eval mode.

    What ends an answer, or is a part of it, is never chosen, so that greedy answers have the length asked for.
    """
    import torch

    from yivl.checkpoint.loading import LoadedModel
    from yivl.image_processing import ImageProcessor

    config = shape_config(shape, dtype)
    tokenizer, processor = small_files(config)
    model = random_weights(config, dtype, device).eval()
    with torch.no_grad():
        parts = [
            index for index, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if "#" in token
        ]
        model.lm_head.weight[[*parts, tokenizer.eos_token_id]] = 0
        model.lm_head.weight[len(tokenizer) :] = 0  # the tokenizer of the golden model is smaller
    return LoadedModel(model, tokenizer, ImageProcessor(processor, config.image_aspect_ratio), "model")


def random_weights(config: Any, dtype: str, device: str) -> Any:
    """Return the model of a configuration with random weights, created on the device."""
    import torch

    from yivl.model.architectures import model_class

    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return model_class(config)(config)
    finally:
        torch.set_default_dtype(torch.float32)


def small_files(config: Any) -> tuple[Any, Any]:
    """Return the tokenizer of the golden model of an architecture, and the CLIP image processor of a shape."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from yivl.image_processing import set_image_size
    from yivl.tokenization import load_tokenizer

    processor = CLIPImageProcessorPil()
    set_image_size(processor, config.vision_config.image_size, config.image_aspect_ratio)
    golden = TESTS / "golden_internvl" if config.prompt_template.stop_token else GOLDEN
    return load_tokenizer(golden / "checkpoint"), processor


def write_random_checkpoint(shape: str, dtype: str, folder: Path, device: str = "cpu") -> None:
    """Write a ``random_model``, created on the device, in at least four shards."""
    from yivl.checkpoint.saving import save_checkpoint

    loaded = random_model(shape, dtype, device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    save_checkpoint(
        loaded.model,
        folder,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor.clip_processor,
        max_shard_size=size // 4,
    )
