"""InternVL-Chat as ``InternVLForConditionalGeneration`` of transformers, whose names and query weights differ."""

import re
from collections.abc import Iterator
from typing import Any

VIT = "model.vision_tower.vision_tower.vision_model."
NAMES = (
    (r"^model\.(layers|norm|embed_tokens)\.", r"model.language_model.\1."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^model\.mm_projector\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.3\.", "model.multi_modal_projector.linear_2."),
    (rf"^{re.escape(VIT)}embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (rf"^{re.escape(VIT)}embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (rf"^{re.escape(VIT)}embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (rf"^{re.escape(VIT)}encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)


def as_transformers(model: Any) -> Any:
    """Return the model of transformers with the weights of an ``InternVLChatModel``, which it shares.

    The order of its image tokens is that of ``ps_version`` v2.
    """
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig

    own, vision = model.config, model.config.vision_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    text = LlamaConfig(**{name: getattr(own, name) for name in names}, bos_token_id=None, eos_token_id=None)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    names += ("norm_type", "layer_norm_eps", "hidden_act")
    config = InternVLConfig(
        text_config=text,
        vision_config=InternVLVisionConfig(
            **{name: getattr(vision, name) for name in names},
            use_qk_norm=vision.qk_normalization,
            attention_bias=vision.qkv_bias,
        ),
        image_token_id=own.vocab_size - 1,
        downsample_ratio=own.downsample_ratio,
        vision_feature_layer=own.mm_vision_select_layer,
        tie_word_embeddings=False,
    )
    config.dtype = model.dtype
    with torch.device("meta"):
        converted = InternVLForConditionalGeneration(config)
    converted.load_state_dict(dict(_weights(model)), assign=True)
    # Not parameters, and without memory on the meta device.
    converted.model.language_model.rotary_emb = type(converted.model.language_model.rotary_emb)(text)
    return converted.to(model.device).eval()


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    for key, value in model.state_dict().items():
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            for part, weight in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                yield name.replace("qkv", part), weight
        else:
            yield name, value
