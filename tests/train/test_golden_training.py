"""Losses and gradients of the reference in training mode, from its own labels."""

from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, golden_arrays, golden_json

from yivl.checkpoint.loading import load_model
from yivl.model.modeling import YiVLForCausalLM

TRAINING = golden_json("train_batches")
ARRAYS = golden_arrays("train_batches")
PIXELS = golden_arrays("image_pixels")
# Its recorded loss shows the mask bug of the reference (docs/fidelity.md); the correct values are recorded too.
BUGGY = "two_images_padded"


@pytest.fixture(scope="module")
def model() -> YiVLForCausalLM:
    return load_model(CHECKPOINT, device="cpu").model


def batch(name: str) -> dict[str, Any]:
    """Return the inputs of a recorded batch; samples without a placeholder have no image."""
    input_ids, labels, mask = (ARRAYS[f"{name}__{key}"].long() for key in ("input_ids", "labels", "attention_mask"))
    keys = TRAINING["batches"][name]["image_of_each"]
    images = [PIXELS[key] for key, ids in zip(keys, input_ids, strict=True) if (ids == -200).any()]
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "images": images or None}


@pytest.mark.parametrize("name", [name for name in TRAINING["batches"] if name != BUGGY])
def test_spliced_labels_mask_and_positions_equal_the_reference(name: str, model: YiVLForCausalLM) -> None:
    inputs = batch(name)
    fused = model.fuse(
        inputs["input_ids"], inputs["images"], attention_mask=inputs["attention_mask"], labels=inputs["labels"]
    )
    length = fused.inputs_embeds.shape[1]
    mask = ARRAYS[f"{name}__spliced_attention_mask"].long()
    assert mask[:, length:].sum() == 0  # the reference may keep columns of padding
    torch.testing.assert_close(fused.attention_mask, mask[:, :length])
    torch.testing.assert_close(fused.labels, ARRAYS[f"{name}__spliced_labels"].long()[:, :length])
    torch.testing.assert_close(fused.position_ids, ARRAYS[f"{name}__position_ids"].long()[:, :length])


@pytest.mark.parametrize("name", TRAINING["batches"])
def test_loss_and_gradients_equal_the_reference(name: str, model: YiVLForCausalLM) -> None:
    recorded = TRAINING["batches"][name]
    model.train()
    model.zero_grad(set_to_none=True)
    output = model(**batch(name), skip_logits=True)  # as the trainer calls it
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss.item() - recorded["reference_loss_token_weighted"]) < 1e-4

    key = f"{name}__reference" if name == BUGGY else name
    parameters = dict(model.named_parameters())
    assert parameters.keys() == TRAINING["grad_l2_norms"][key].keys()
    for parameter_name, expected in TRAINING["grad_l2_norms"][key].items():
        gradient = parameters[parameter_name].grad
        norm = 0.0 if gradient is None else gradient.norm().item()
        assert norm == pytest.approx(expected or 0.0, rel=1e-3, abs=1e-6), parameter_name
    prefix = f"{key}__grad__"
    for array_name in ARRAYS:
        if array_name.startswith(prefix):
            gradient = parameters[array_name.removeprefix(prefix)].grad
            torch.testing.assert_close(gradient, ARRAYS[array_name], atol=1e-4, rtol=1e-3)


def test_full_logits_yield_the_same_loss(model: YiVLForCausalLM) -> None:
    inputs = batch("mixed")
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
        labels = model.fuse(
            inputs["input_ids"], inputs["images"], attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        ).labels
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
