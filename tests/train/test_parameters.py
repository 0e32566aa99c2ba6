"""Trainable and frozen parameters in every stage and mode, and the initialization of a run."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from peft.tuners.lora.dora import DoraLinearLayer
from support.golden import CHECKPOINT
from support.models import OPEN_CLIP_VISION
from support.training import IMAGES, VIT, conversation, flags, train, weights, write_language_model, write_rows
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from yivl.checkpoint.loading import LoadedModel, load_model, read_small_files
from yivl.model.modeling import YiVLForCausalLM
from yivl.train import parameters
from yivl.train.arguments import parse_arguments

TOWER, PROJECTOR = "model.vision_tower.", "model.mm_projector."
# The golden ViT has four layers and feeds the projector from the third.
UNUSED = r"\.encoder\.layers\.3\.|post_layernorm"

MODES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "stage 1": ({"stage": 1, "image_size": 56, "global_batch_size": 2}, {"tower", "projector"}),
    "stage 2": ({"stage": 2, "image_size": 56, "global_batch_size": 2}, {"tower", "projector"}),
    "stage 3": ({"stage": 3, "image_size": 56, "global_batch_size": 2}, {"tower", "projector", "language model"}),
    "projector": ({"tune_mm_mlp_adapter": True}, {"projector"}),
    "language model": ({"freeze_mm_mlp_adapter": True}, {"language model"}),
    "default": ({}, {"projector", "language model"}),
    "tower": ({"unfreeze_mm_vision_tower": True, "freeze_backbone": True, "freeze_mm_mlp_adapter": True}, {"tower"}),
    "lora": ({"lora_enable": True, "freeze_mm_mlp_adapter": True}, {"adapters"}),
    "lora and projector": ({"lora_enable": True}, {"adapters", "projector"}),
    "lora everywhere": ({"lora_enable": True, "lora_vision_tower": True}, {"adapters", "tower adapters", "projector"}),
}


def kind_of(name: str) -> str:
    """The part of the model that a checkpoint key belongs to, independent of the code under test."""
    if ".lora_" in name:
        return "tower adapters" if "vision_tower" in name else "adapters"
    if name.startswith(TOWER):
        return "unused" if re.search(UNUSED, name) else "tower"
    return "projector" if name.startswith(PROJECTOR) else "language model"


@pytest.mark.parametrize("mode", MODES)
def test_a_step_changes_exactly_the_trainable_parameters(mode: str, tmp_path: Path) -> None:
    changes, expected = MODES[mode]
    train(
        tmp_path / "out", write_rows(tmp_path / "rows.json"), max_steps=2, learning_rate=1e-2, warmup_ratio=0, **changes
    )
    before = YiVLForCausalLM.from_pretrained(CHECKPOINT).state_dict()
    after = {name.removeprefix("base_model.model."): value for name, value in weights(tmp_path / "out").items()}
    moved, stayed = set(), set()
    for name, value in after.items():
        if ".lora_B." in name:
            is_same = not value.any()  # they start at zero
        elif ".lora_" in name:
            continue  # starts at random
        else:
            is_same = torch.equal(value, before[name])
        (stayed if is_same else moved).add(kind_of(name))
    assert moved == expected
    assert not stayed & expected


@pytest.mark.parametrize("mode", MODES)
def test_the_table_names_the_trainable_parts(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from yivl.train.__main__ import main

    changes, expected = MODES[mode]
    with caplog.at_level("INFO"):
        main(flags(tmp_path / "out", write_rows(tmp_path / "rows.json"), dry_run=True, **changes))
    table = next(message for message in caplog.messages if message.startswith("part "))
    rows = {line[:24].strip(): line.split() for line in table.splitlines()[1:]}
    names = {
        "tower": "vision_tower",
        "projector": "mm_projector",
        "language model": "language_model",
        "adapters": "language_model adapters",
        "tower adapters": "vision_tower adapters",
    }
    assert {name for name, row in rows.items() if row[-1] != "frozen"} == {names[kind] for kind in expected}
    assert not (tmp_path / "out").exists()


def arguments_of(**changes: Any) -> Any:
    return parse_arguments(flags(Path("out"), "rows.json", **changes))


def test_each_part_has_its_learning_rate(loaded: LoadedModel) -> None:
    model = copy.deepcopy(loaded.model)
    arguments = arguments_of(
        unfreeze_mm_vision_tower=True, mm_projector_lr=3e-4, mm_vision_tower_lr=2e-6, weight_decay=0.1
    )
    parameters.select_trainable(model, arguments.model, model.config.num_vision_layers)
    decayed = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    groups = parameters.parameter_groups(model, arguments.training, decayed)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    for group in groups:
        rates = {"tower": 2e-6, "projector": 3e-4, "language model": 1e-3}
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == rates[kind_of(name)]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
            assert name not in seen
            seen.add(name)
    assert seen == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_schedule_and_the_clip_are_applied(tmp_path: Path) -> None:
    log = train(
        tmp_path / "out",
        write_rows(tmp_path / "rows.json"),
        warmup_ratio=0.25,
        max_grad_norm=0.5,
        mm_projector_lr=1e-4,
        save_strategy="no",
    )
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[-1] < 1e-4  # cosine, near its end
    assert all(line["grad_norm"] > 0.5 for line in log if "grad_norm" in line)  # before the clip


def test_frozen_modules_are_in_eval_mode_and_their_layers_can_be_checkpointed(loaded: LoadedModel) -> None:
    model = copy.deepcopy(loaded.model)
    model.model.layers[0].self_attn.attention_dropout = 0.9
    arguments = arguments_of(stage=1, image_size=56, global_batch_size=2)
    parameters.select_trainable(model, arguments.model, model.config.num_vision_layers)
    model.train()
    parameters.freeze_modes(parameters.frozen_modules(model))
    assert model.training
    assert model.model.mm_projector[0].training
    assert model.get_vision_tower().vit.encoder.layers[0].self_attn.training
    for layer in model.model.layers:
        assert layer.training  # transformers requires it for gradient checkpointing
        assert not any(module.training for module in layer.modules() if module is not layer)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_recomputes_layers_and_keeps_gradients(frozen: bool, loaded: LoadedModel) -> None:
    images = torch.randn(1, 3, 56, 56)
    ids = torch.tensor([[294, 332, -200, 19, 748, 694]])
    counts: list[int] = []
    found: list[dict[str, torch.Tensor]] = []
    for language_model, vision_tower in ((False, False), (True, True), (True, False), (False, True)):
        model = copy.deepcopy(loaded.model)
        arguments = arguments_of(unfreeze_mm_vision_tower=True, freeze_backbone=frozen)
        parameters.select_trainable(model, arguments.model, model.config.num_vision_layers)
        parameters.enable_gradient_checkpointing(model, language_model=language_model, vision_tower=vision_tower)
        model.train()
        parameters.freeze_modes(parameters.frozen_modules(model))
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        for part in (model.model.layers[0].mlp, model.get_vision_tower().vit.encoder.layers[0].mlp):
            part.register_forward_pre_hook(count)
        model(input_ids=ids, images=images, labels=ids.clamp(min=-100), use_cache=False).loss.backward()
        counts.append(calls)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert counts == [2, 4, 3, 3]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name])


def test_layers_with_gradient_checkpointing_belong_to_one_part(loaded: LoadedModel) -> None:
    layers = [name for name, m in loaded.model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    assert sum(".vision_tower." in name for name in layers) == 4
    assert len(layers) == 4 + loaded.model.config.num_hidden_layers


def test_trainable_parameters_have_fp32_master_weights_and_frozen_ones_do_not(loaded: LoadedModel) -> None:
    model: nn.Module = copy.deepcopy(loaded.model).to(torch.bfloat16)
    parameters.select_trainable(model, arguments_of(tune_mm_mlp_adapter=True).model, 3)
    parameters.upcast_trainable_params(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(PROJECTOR) else torch.bfloat16)


def test_bf16_mixed_precision_saves_a_bf16_model_and_fp32_checkpoints(tmp_path: Path) -> None:
    train(tmp_path / "out", write_rows(tmp_path / "rows.json"), bf16=True, max_steps=3)
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    checkpoint = weights(tmp_path / "out/checkpoint-3")
    assert checkpoint["lm_head.weight"].dtype == torch.float32
    assert checkpoint[f"{TOWER}vision_tower.vision_model.embeddings.class_embedding"].dtype == torch.bfloat16


# Initialization.


def test_stage_1_starts_from_a_language_model_a_vit_and_a_new_projector(loaded: LoadedModel, tmp_path: Path) -> None:
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    train(
        tmp_path / "out",
        write_rows(tmp_path / "rows.json"),
        model_name_or_path=language_model,
        vision_tower=VIT,
        stage=1,
        image_size=28,
        global_batch_size=2,
        max_steps=1,
        learning_rate=0,
    )
    after, before = weights(tmp_path / "out"), loaded.model.state_dict()
    for name, value in after.items():
        if kind_of(name) == "language model":
            torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    assert after[f"{PROJECTOR}0.weight"].std() > 0
    assert not torch.equal(after[f"{PROJECTOR}0.weight"], before[f"{PROJECTOR}0.weight"])
    position = after[f"{TOWER}vision_tower.vision_model.embeddings.position_embedding.weight"]
    assert position.shape[0] == 1 + (28 // 14) ** 2
    reloaded = YiVLForCausalLM.from_pretrained(tmp_path / "out")
    assert (reloaded.config.num_patches, reloaded.config.mm_vision_tower) == (4, f"./vit/{VIT.name}")


def test_stage_1_starts_from_an_open_clip_vit(loaded: LoadedModel, tmp_path: Path) -> None:
    visual = _build_vision_tower(64, CLIPVisionCfg(**OPEN_CLIP_VISION))
    vit = tmp_path / "open_clip"
    vit.mkdir()
    state_dict = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    torch.save(state_dict | {"logit_scale": torch.ones(())}, vit / "open_clip_pytorch_model.bin")
    (vit / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 64, "vision_cfg": OPEN_CLIP_VISION}})
    )
    train(
        tmp_path / "out",
        write_rows(tmp_path / "rows.json"),
        model_name_or_path=write_language_model(tmp_path / "llm", loaded.model),
        vision_tower=vit,
        stage=1,
        image_size=56,
        global_batch_size=2,
        max_steps=1,
        learning_rate=0,
    )
    result = load_model(tmp_path / "out", device="cpu")
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        features = visual.eval().forward_intermediates(
            pixels,
            indices=[OPEN_CLIP_VISION["layers"] - 2],
            intermediates_only=True,
            normalize_intermediates=False,
            output_fmt="NLC",
        )["image_intermediates"][0]
        torch.testing.assert_close(result.model.get_vision_tower()(pixels), features, atol=1e-5, rtol=1e-4)
    assert result.image_processor.image_size == 56


def test_position_embeddings_are_interpolated_as_transformers_does(loaded: LoadedModel) -> None:
    model = copy.deepcopy(loaded.model)
    images = torch.randn(1, 3, 112, 112)
    embeddings = model.get_vision_tower().vit.embeddings
    with torch.no_grad():
        expected = embeddings(images, interpolate_pos_encoding=True)
        model.resize_images(112)
        torch.testing.assert_close(model.get_vision_tower().vit.embeddings(images), expected)
        assert model.encode_images(images).shape[1] == model.config.num_patches == 64
    with pytest.raises(ValueError, match="not a multiple of the patch size 14"):
        model.resize_images(100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 50}, "image_size 50 is not a multiple of the patch size 14"),
        ({"model_name_or_path": "nowhere"}, "nowhere: no such folder"),
        ({"model_name_or_path": "LLM"}, "a language model without a ViT"),
        ({"image_folder": "nowhere"}, r"none of its first 4 images exists, such as nowhere/photo_rgb.jpg; set"),
        ({"data_path": "LONG", "on_bad_row": "skip"}, "none of its first 1 images exists"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1 is negative; 0 is none"),
        ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, "no parameter is trainable"),
        ({"mm_vision_select_layer": -1}, "--mm_vision_select_layer -1: .* has another projector or ViT"),
        ({"lora_enable": True, "bits": 4}, "training in 4 bits on a CPU needs layer widths"),
        ({"optim": "apollo_adamw"}, "--optim"),
        ({"eval_data_path": "EMPTY", "eval_strategy": "steps"}, r"empty\.json: no rows"),
        ({"eval_data_path": "BAD", "eval_strategy": "steps", "on_bad_row": "skip"}, "no row to evaluate on"),
        ({"data_path": "nowhere.json"}, r"nowhere\.json: cannot be read"),
        ({"data_path": "EMPTY"}, r"empty\.json: no rows"),
        ({"data_path": "BAD", "on_bad_row": "skip"}, "no row to train on"),
        ({"data_path": "*.tar"}, "--max_steps is missing"),
        ({"resume": "nowhere"}, "nowhere: no checkpoint of a run"),
    ],
)
def test_errors_before_training_name_the_reason(
    changes: dict[str, Any], message: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    from yivl.errors import YiVLError

    if changes.get("model_name_or_path") == "LLM":
        changes = changes | {"model_name_or_path": write_language_model(tmp_path / "llm", loaded.model)}
    files = {
        "EMPTY": write_rows(tmp_path / "empty.json", []),
        "BAD": write_rows(tmp_path / "bad.json", [{"conversations": []}]),
        "LONG": write_rows(tmp_path / "long.json", [conversation("iVBORw0KGgo" * 400, "q", "a")]),  # base64
    }
    changes = {name: files.get(value, value) for name, value in changes.items()}
    data = changes.pop("data_path", None) or write_rows(tmp_path / "rows.json")
    with pytest.raises(YiVLError, match=message):
        train(tmp_path / "out", data, **{"image_folder": IMAGES} | changes)


def test_adapters_of_a_layer_keep_one_copy_of_its_input_under_autocast() -> None:
    """They would keep one each if peft cast the input to float32, which autocast casts back."""
    config, _, _ = read_small_files(CHECKPOINT)
    given = "--model_name_or_path m --data_path d --output_dir o --bf16 True --lora_enable True"
    model: Any = YiVLForCausalLM(config).to(torch.bfloat16).train()
    model, _ = parameters.set_up_model(model, parse_arguments(given.split()), base="m")
    attention = model.get_base_model().model.layers[0].self_attn
    hidden = torch.randn(1, 7, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == hidden.numel():
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        outputs = [attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)]
    assert len(outputs) == 3
    assert saved == {hidden.untyped_storage().data_ptr()}


def test_the_norm_of_dora_is_computed_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    given = "--model_name_or_path m --data_path d --output_dir o --bf16 True --lora_enable True --use_dora True"
    model: Any = YiVLForCausalLM(config).to(torch.bfloat16).train()
    model, _ = parameters.set_up_model(model, parse_arguments(given.split()), base="m")
    dtypes: list[torch.dtype] = []
    compute = DoraLinearLayer.get_weight_norm

    def get_weight_norm(self: DoraLinearLayer, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtypes.append(weight.dtype)
        return compute(self, weight, *args, **kwargs)

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", get_weight_norm)
    hidden = torch.randn(1, 7, config.hidden_size, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model.get_base_model().model.layers[0].self_attn.q_proj(hidden)
    assert dtypes == [torch.float32]
