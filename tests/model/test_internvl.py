"""Vision features, logits, losses and gradients of the original InternVL-Chat."""

from functools import cache
from typing import Any

import pytest
import torch
from support.golden_internvl import golden_arrays, golden_json, golden_model, pixels_of, published_name

from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.inference.decoding import supports
from yivl.model.internvl import InternVLChatModel
from yivl.model.projector import pixel_shuffle
from yivl.train.parameters import enable_gradient_checkpointing

VISION, LOGITS, TRAINING = golden_arrays("vision"), golden_arrays("logits"), golden_arrays("train_batches")
PIXELS = golden_arrays("image_pixels")
TURNS = [(f"{chat['id']}_{n}", turn) for chat in golden_json("chat")["chats"] for n, turn in enumerate(chat["turns"])]
BATCHES = {batch["id"]: batch for batch in golden_json("train_batches")["batches"]}
UNSUPERVISED = BATCHES.pop("only_masked_record")
RECORDS = {record["id"]: record for record in golden_json("train_preprocess")["max_length_2048"]}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CONTEXT = 642
IMAGE_TOKENS = 9

model = cache(golden_model)
"""Tests must not modify it."""


@torch.no_grad()
def test_states_of_the_vit_equal_the_original() -> None:
    vit, states = model().get_vision_tower().vit, VISION["pixel_values"][:1]
    attended, outputs = [], []
    vit.layers[0].attn.register_forward_hook(lambda _, __, output: attended.append(output))
    vit.layers[0].mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
    states = vit.embed(states)
    torch.testing.assert_close(states, VISION["embeddings"], **TOLERANCE)
    for index, layer in enumerate(vit.layers):
        torch.testing.assert_close(states, VISION[f"hidden_{index}"], **TOLERANCE)
        states = layer(states)
    torch.testing.assert_close(states, VISION["hidden_4"], **TOLERANCE)
    torch.testing.assert_close(attended[0], VISION["layer0_attn_output"], **TOLERANCE)
    torch.testing.assert_close(outputs[0], VISION["layer0_mlp_output"], **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_patch_features_equal_the_original(attention: str) -> None:
    own = golden_model()
    own.set_attn_implementation(attention)
    assert own.get_vision_tower().vit.config._attn_implementation == attention
    features = own.get_vision_tower()(VISION["pixel_values"])
    torch.testing.assert_close(features, VISION["last_hidden_state"][:, 1:], **TOLERANCE)


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 3])
@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_image_tokens_equal_the_original(version: str, select_layer: int) -> None:
    """Layer 3 of 4 is the one before the last."""
    features = golden_model(ps_version=version, select_layer=select_layer).extract_feature(VISION["pixel_values"])
    expected = VISION[f"extract_feature_{version}_layer{-2 if select_layer == 3 else select_layer}"]
    torch.testing.assert_close(features, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_pixel_shuffle_equals_the_original(name: str) -> None:
    block_size = round(1 / golden_json("vision")[f"shuffle_{name}_scale"])
    for version in ("v1", "v2"):
        shuffled = pixel_shuffle(VISION[f"shuffle_{name}_input"], block_size, transposed=version == "v1")
        torch.testing.assert_close(shuffled, VISION[f"shuffle_{name}_{version}"], atol=0, rtol=0)


@torch.no_grad()
def test_the_projector_equals_the_original() -> None:
    states = VISION["mlp1_input"]
    norm, *rest = model().model.mm_projector
    states = norm(states)
    torch.testing.assert_close(states, VISION["mlp1_after_layernorm"], **TOLERANCE)
    for layer in rest:
        states = layer(states)
    torch.testing.assert_close(states, VISION["mlp1_output"], **TOLERANCE)


@torch.no_grad()
def test_another_image_size_equals_the_original() -> None:
    own, size = golden_model(), golden_json("vision")["other_size"]
    tower, pixels, expected = (
        own.get_vision_tower(),
        VISION["pixel_values_other_size"],
        VISION["last_hidden_state_other_size"],
    )
    torch.testing.assert_close(tower(pixels), expected[:, 1:], **TOLERANCE)
    on_the_fly = own.extract_feature(pixels)
    assert on_the_fly.shape[1] == golden_json("vision")["extract_feature_at_other_size_tokens"]
    with pytest.raises(ValueError, match="images of 16 tokens; the model has 9 per image"):
        own(torch.tensor([[6, IMAGE_TOKEN_INDEX]]), images=pixels)
    own.resize_images(size)
    positions = tower.vit.embeddings.position_embedding
    torch.testing.assert_close(positions, VISION["position_embedding_resized"], **TOLERANCE)
    torch.testing.assert_close(own.extract_feature(pixels), on_the_fly, atol=0, rtol=0)
    assert (own.config.num_patches, own.config.to_published_dict()["force_image_size"]) == (16, size)
    assert own(torch.tensor([[6, IMAGE_TOKEN_INDEX]]), images=pixels).logits.shape[1] == 17


def slots(input_ids: list[int], labels: list[int] | None = None) -> list[int]:
    """Return ids, or their labels, with one ``-200`` instead of the image tokens of an image."""
    values, run, result = input_ids if labels is None else labels, 0, []
    for token, value in zip(input_ids, values, strict=True):
        run = run + 1 if token == CONTEXT else 0
        if run == 0:
            result.append(value)
        elif run % IMAGE_TOKENS == 1:
            result.append(IMAGE_TOKEN_INDEX)
    return result


@pytest.mark.parametrize(("name", "turn"), TURNS, ids=[name for name, _ in TURNS])
@torch.no_grad()
def test_logits_equal_the_original(name: str, turn: dict[str, Any]) -> None:
    """By the call of the original, and by that of Yi-VL."""
    pixels, ids = pixels_of(turn["images"]), turn["input_ids"]
    for output in (
        model()(torch.tensor([ids]), pixel_values=pixels),
        model()(torch.tensor([slots(ids)]), images=pixels),
    ):
        logits = output.logits[0]
        assert len(logits) == len(ids)
        torch.testing.assert_close(logits[turn["logits_start"] :], LOGITS[f"{name}__logits"], **TOLERANCE)
        torch.testing.assert_close(logits.logsumexp(-1), LOGITS[f"{name}__logsumexp"], **TOLERANCE)
        assert logits.argmax(-1).tolist() == LOGITS[f"{name}__argmax"].tolist()


@torch.no_grad()
def test_embeddings_and_hidden_states_equal_the_original() -> None:
    name, turn = TURNS[0]
    ids, pixels = torch.tensor([turn["input_ids"]]), pixels_of(turn["images"])
    fused = model().fuse(torch.tensor([slots(turn["input_ids"])]), pixels)
    torch.testing.assert_close(fused.inputs_embeds[0], LOGITS[f"{name}__inputs_embeds"], **TOLERANCE)
    states = model()(ids, pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for index, hidden in enumerate(states):
        torch.testing.assert_close(hidden[0, -1], LOGITS[f"{name}__hidden_{index}_last_position"], **TOLERANCE)


@pytest.mark.parametrize("name", ["img_en_0", "img_zh_0"])
@torch.no_grad()
def test_logits_of_greedy_steps_equal_the_original(name: str) -> None:
    turn = dict(TURNS)[name]
    ids = torch.tensor([turn["input_ids"]])
    output = model()(ids, torch.ones_like(ids), pixel_values=pixels_of(turn["images"]), use_cache=True)
    steps = [output.logits[0, -1]]
    for length, token in enumerate(turn["generated_ids"][:-1], ids.shape[1] + 1):
        mask = torch.ones(1, length, dtype=torch.long)
        output = model()(torch.tensor([[token]]), mask, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits[0, -1])
    torch.testing.assert_close(torch.stack(steps), LOGITS[f"{name}__step_logits"], **TOLERANCE)


@pytest.mark.parametrize(("name", "turn"), TURNS, ids=[name for name, _ in TURNS])
def test_greedy_tokens_equal_the_original(name: str, turn: dict[str, Any]) -> None:
    ids = torch.tensor([slots(turn["input_ids"])])
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 7}
    output = model().generate(ids, images=pixels_of(turn["images"]), **options)
    assert output[0, ids.shape[1] :].tolist() == turn["generated_ids"]


def test_the_decoding_step_of_the_package_is_used() -> None:
    """It computes what the forward method does without ``pixel_values``."""
    assert supports(golden_model())
    assert not supports(golden_model().train())


def batch_of(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the arguments of ``forward`` for a recorded batch."""
    keys = [key for record in batch["records"] for key in RECORDS[record]["pixel_keys"]]
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arguments = {name: TRAINING[f"{batch['id']}__{name}"] for name in names}
    pixels = torch.stack([PIXELS[key] for key in keys])
    return arguments | {"pixel_values": pixels, "image_flags": torch.tensor(batch["image_flags"])}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_loss_and_gradients_equal_the_original(batch: dict[str, Any], is_checkpointed: bool) -> None:
    own, name = golden_model().train(), batch["id"]
    enable_gradient_checkpointing(own, language_model=is_checkpointed, vision_tower=is_checkpointed)
    output = own(**batch_of(batch))
    logsumexp = output.logits.logsumexp(-1)
    torch.testing.assert_close(logsumexp, TRAINING[f"{name}__logsumexp"], **TOLERANCE)
    norms = golden_json("train_batches")["grad_l2_norms"][name]
    assert output.loss.item() == pytest.approx(batch["loss"], abs=1e-4)
    output.loss.backward()
    gradients = {published_name(key): value.grad for key, value in own.named_parameters()}
    assert gradients.keys() == norms.keys()
    for key, norm in norms.items():
        assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    recorded = [key for key in TRAINING if key.startswith(f"{name}__grad__")]
    assert len(recorded) == 8
    for key in recorded:
        gradient = gradients[key.removeprefix(f"{name}__grad__")]
        torch.testing.assert_close(gradient, TRAINING[key], atol=1e-4, rtol=1e-3)
    row = gradients["language_model.model.embed_tokens.weight"][CONTEXT]
    torch.testing.assert_close(row, TRAINING[f"{name}__grad_embed_rows__{CONTEXT}"], atol=1e-4, rtol=1e-3)


def test_the_loss_without_a_supervised_token_is_zero() -> None:
    """That of the original is NaN: a row of docs/fidelity.md."""
    assert UNSUPERVISED["loss"] is None
    own = golden_model().train()
    loss = own(**batch_of(UNSUPERVISED)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(value.grad is None or not value.grad.any() for value in own.parameters())


def test_the_loss_with_one_slot_per_image_equals_the_original() -> None:
    """The call of the trainer: samples without an image have none."""
    batch = BATCHES["mixed_image_text_image"]
    arguments, rows = batch_of(batch), []
    names = ("input_ids", "labels", "attention_mask")
    for ids, labels, mask in zip(*(arguments[name] for name in names), strict=True):
        real = int(mask.sum())
        rows.append([slots(ids[:real].tolist()), slots(ids[:real].tolist(), labels[:real].tolist())])
    padding = [max(len(ids) for ids, _ in rows) - len(ids) for ids, _ in rows]
    with torch.no_grad():
        output = model()(
            torch.tensor([ids + [0] * width for (ids, _), width in zip(rows, padding, strict=True)]),
            torch.tensor([[1] * len(ids) + [0] * width for (ids, _), width in zip(rows, padding, strict=True)]),
            labels=torch.tensor([labels + [-100] * width for (_, labels), width in zip(rows, padding, strict=True)]),
            images=arguments["pixel_values"][arguments["image_flags"] == 1],
        )
    assert float(output.loss) == pytest.approx(batch["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "num_images", "flags", "message"),
    [
        ([6] + [CONTEXT] * 9, 2, None, "input_ids have 9 <IMG_CONTEXT> tokens; expected 9 for each of 2 images"),
        ([6] + [CONTEXT] * 18, 1, None, "input_ids have 18 <IMG_CONTEXT> tokens; expected 9 for each of 1 images"),
        ([6] + [CONTEXT] * 10, 1, [1], "input_ids have 10 <IMG_CONTEXT> tokens; expected 9 for each of 1 images"),
        ([6, CONTEXT], 1, [0], "input_ids have 1 <IMG_CONTEXT> tokens; expected 9 for each of 0 images"),
    ],
)
def test_image_tokens_and_images_that_differ_in_number_are_refused(
    ids: list[int], num_images: int, flags: list[int] | None, message: str
) -> None:
    """The original cuts surplus features and multiplies the loss by 0: a row of docs/fidelity.md."""
    pixels = VISION["pixel_values"][:num_images]
    image_flags = None if flags is None else torch.tensor(flags)
    with pytest.raises(ValueError, match=message):
        model()(torch.tensor([ids]), pixel_values=pixels, image_flags=image_flags)


def test_the_id_of_the_image_token_must_be_known() -> None:
    own = InternVLChatModel(model().config)
    with pytest.raises(ValueError, match="img_context_token_id is None"):
        own(torch.tensor([[6]]), pixel_values=VISION["pixel_values"])
    with pytest.raises(ValueError, match="pixel_values without input_ids"):
        own(pixel_values=VISION["pixel_values"])


@torch.no_grad()
def test_padding_on_the_left_changes_no_logits() -> None:
    name, turn = TURNS[0]
    ids, pixels = turn["input_ids"], pixels_of(turn["images"])
    padded, mask = torch.tensor([[0, 0, *ids]]), torch.tensor([[0, 0, *[1] * len(ids)]])
    logits = model()(padded, mask, pixel_values=pixels).logits[0, 2:]
    torch.testing.assert_close(logits, LOGITS[f"{name}__logits"], **TOLERANCE)
