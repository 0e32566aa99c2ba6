"""InternViT beside its recorded features: stochastic depth, other sizes, initialization, transformers' own classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.golden_internvl import golden_arrays, golden_json, golden_model, published_name
from transformers import InternVLConfig as NativeConfig
from transformers import InternVLForConditionalGeneration

from yivl.model.attention import register_packed_sdpa
from yivl.model.block_attention import register_block_sdpa
from yivl.model.intern_vit import DropPath, InternViT
from yivl.model.internvl_configuration import InternVisionConfig
from yivl.model.projector import PixelShuffleProjector
from yivl.train.parameters import enable_gradient_checkpointing, freeze_modes, frozen_modules

PIXELS = golden_arrays("vision")["pixel_values"]
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "image_size": 84}


def vit_of(**fields: Any) -> InternViT:
    return InternViT(InternVisionConfig(**{**SIZES, "num_hidden_layers": 4, **fields}))


def run(vit: InternViT, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    states = vit.embed(pixels)
    for layer in vit.layers:
        states = layer(states)
    return states


def native_key(name: str) -> str:
    """Return the name of a parameter in transformers' InternVL; ``attn.qkv`` is three there."""
    name = published_name(name)
    renames = [("vision_model.", "model.vision_tower."), ("language_model.model.", "model.language_model.")]
    renames += [("language_model.lm_head", "lm_head"), ("mlp1.0", "model.multi_modal_projector.layer_norm")]
    renames += [(f"mlp1.{old}", f"model.multi_modal_projector.linear_{new}") for old, new in ((1, 1), (3, 2))]
    renames += [("embeddings.class_embedding", "embeddings.cls_token"), ("layers.", "layer.")]
    renames += [("embeddings.patch_embedding", "embeddings.patch_embeddings.projection")]
    renames += [("position_embedding", "position_embeddings"), ("attn.proj", "attention.projection_layer")]
    renames += [("attn.", "attention."), ("norm1", "layernorm_before"), ("norm2", "layernorm_after")]
    renames += [("ls1", "lambda_1"), ("ls2", "lambda_2")]
    is_of_the_llm = name.startswith("language_model.")
    for old, new in renames[:3] if is_of_the_llm else renames:
        name = name.replace(old, new)
    return name


@torch.no_grad()
def test_the_classes_of_transformers_compute_the_same() -> None:
    """They have pixel shuffle v2 only: its result is transposed here."""
    own = golden_model()
    vision = own.config.vision_config
    shapes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    text = own.config.to_published_dict()["llm_config"]
    config = NativeConfig(
        vision_config={name: getattr(vision, name) for name in shapes}
        | {"image_size": [84, 84], "patch_size": [14, 14], "use_qk_norm": True, "norm_type": "rms_norm"},
        text_config={name: text[name] for name in text if name != "architectures"},
        image_token_id=642,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    native = InternVLForConditionalGeneration(config).eval()
    weights: dict[str, torch.Tensor] = {}
    for name, value in own.state_dict().items():
        key = native_key(name)
        if ".qkv." in key:
            weights |= {key.replace("qkv", f"{n}_proj"): part for n, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            weights[key] = value
    native.load_state_dict(weights)
    shuffle: Callable[..., torch.Tensor] = native.model.pixel_shuffle
    native.model.pixel_shuffle = lambda *arguments, **options: shuffle(*arguments, **options).transpose(1, 2)
    ids = torch.tensor([golden_json("chat")["chats"][0]["turns"][0]["input_ids"]])
    expected = native(input_ids=ids, pixel_values=PIXELS[:1]).logits
    torch.testing.assert_close(own(ids, pixel_values=PIXELS[:1]).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_first_vit_of_6b_has_its_published_size() -> None:
    published = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "image_size": 224}
    with torch.device("meta"):
        vit = InternViT(InternVisionConfig(**published, num_hidden_layers=48))
    # Without the position embeddings of 448 x 448 pixels, which the recorded size has.
    assert sum(value.numel() for value in vit.parameters()) == 5_905_251_200 - 3200 * (1024 - 256)


def test_new_weights_are_those_of_the_original() -> None:
    vit = vit_of(hidden_size=480, num_hidden_layers=1, initializer_factor=0.3)
    layer = vit.layers[0]
    assert layer.ls1.eq(0.3).all()
    assert layer.ls2.eq(0.3).all()
    assert layer.norm1.weight.eq(1).all()
    assert vit.embeddings.position_embedding.std().item() == pytest.approx(1, rel=0.05)
    assert vit.embeddings.class_embedding.std().item() == pytest.approx(1, rel=0.2)
    # The default of PyTorch: uniform, up to one over the square root of the inputs.
    for weight in (layer.attn.qkv.weight, layer.attn.proj.bias, layer.mlp.fc1.weight):
        assert weight.abs().max().item() == pytest.approx(480**-0.5, rel=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_dropped_path_keeps_its_expectation(rate: float) -> None:
    drop_path, branch = DropPath(rate), torch.rand(20_000, 2, 3) + 1
    dropped = drop_path(branch)
    is_kept = dropped.flatten(1).ne(0).all(1)
    assert is_kept.eq(dropped.flatten(1).ne(0).any(1)).all()  # whole images
    torch.testing.assert_close(dropped[is_kept], branch[is_kept] / (1 - rate))
    assert is_kept.float().mean().item() == pytest.approx(1 - rate, abs=0.02)
    assert torch.equal(drop_path.eval()(branch), branch)


def test_the_rate_grows_with_depth_and_has_no_effect_at_inference() -> None:
    vit = vit_of(drop_path_rate=0.6)
    assert [layer.drop_path.rate for layer in vit.layers] == pytest.approx([0, 0.2, 0.4, 0.6])
    plain = vit_of()
    plain.load_state_dict(vit.state_dict())
    torch.testing.assert_close(run(vit.eval()), run(plain.train()), atol=0, rtol=0)
    assert not torch.equal(run(vit.train()), run(vit))


def test_the_recomputed_pass_drops_the_same_paths() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        own = golden_model().train()
        for layer in own.get_vision_tower().vit.layers:
            layer.drop_path.rate = 0.5
        enable_gradient_checkpointing(own, language_model=False, vision_tower=is_checkpointed)
        torch.manual_seed(3)
        own.extract_feature(PIXELS).square().sum().backward()
        gradients.append({name: value.grad for name, value in own.get_vision_tower().named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("size", [(70, 84), (90, 90)])
def test_images_that_are_no_grid_of_patches_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"pixel_values of {size[0]} x {size[1]} pixels; expected a square"):
        vit_of().embed(torch.zeros(1, 3, *size))


def test_the_projector_refuses_other_grids() -> None:
    projector = PixelShuffleProjector(8, 16, 2, transposed=True)
    with pytest.raises(ValueError, match="12 patches are no square grid"):
        projector(torch.zeros(1, 12, 8))
    with pytest.raises(ValueError, match="a grid of 3 x 3 patches does not divide into blocks of 2 per side"):
        projector(torch.zeros(1, 9, 8))


def test_interpolated_position_embeddings_keep_their_dtype_and_train() -> None:
    vit = vit_of(num_hidden_layers=1).to(torch.bfloat16)
    vit.embed(torch.zeros(1, 3, 112, 112, dtype=torch.bfloat16)).sum().backward()
    positions = vit.embeddings.position_embedding
    assert positions.grad is not None
    assert positions.grad[0, 1:].any()
    expected = vit.embed(torch.zeros(1, 3, 112, 112, dtype=torch.bfloat16))
    vit.resize(112)
    assert vit.embeddings.position_embedding.dtype == torch.bfloat16
    assert vit.embeddings.position_embedding.requires_grad
    torch.testing.assert_close(vit.embed(torch.zeros(1, 3, 112, 112, dtype=torch.bfloat16)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("register", [register_packed_sdpa, register_block_sdpa])
@torch.no_grad()
def test_the_attention_functions_of_the_package_compute_the_same(register: Callable[[], str]) -> None:
    own = golden_model()
    expected = own.extract_feature(PIXELS)
    own.set_attn_implementation(register())
    torch.testing.assert_close(own.extract_feature(PIXELS), expected, atol=1e-4, rtol=1e-4)


def test_dropout_of_attention_is_for_training() -> None:
    vit = vit_of(attention_dropout=0.5, dropout=0.5)
    plain = vit_of()
    plain.load_state_dict(vit.state_dict())
    torch.testing.assert_close(run(vit.eval()), run(plain), atol=0, rtol=0)
    assert not torch.equal(run(vit.train()), run(plain))


@torch.no_grad()
def test_layers_after_the_selected_one_do_not_run() -> None:
    own = golden_model(select_layer=-3)
    calls: list[int] = []
    for index, layer in enumerate(own.get_vision_tower().vit.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    own.extract_feature(PIXELS)
    assert calls == [0, 1]


def test_a_frozen_vit_drops_no_paths() -> None:
    own = golden_model()
    expected = own.extract_feature(PIXELS).detach()
    own.get_vision_tower().requires_grad_(False)
    for layer in own.get_vision_tower().vit.layers:
        layer.drop_path.rate = 0.5
    own.train()
    freeze_modes(frozen_modules(own))
    torch.testing.assert_close(own.extract_feature(PIXELS), expected, atol=0, rtol=0)
