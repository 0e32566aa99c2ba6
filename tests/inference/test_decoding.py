"""The decoding step computes the logits of the model's forward method."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.decoding import compare, make_model
from support.golden import CHECKPOINT, GOLDEN
from torch import nn

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.inference.chat import Chat
from yivl.inference.decoding import native_matrix_vector, supports
from yivl.inference.engine import Engine, decode
from yivl.inference.kv_cache import ROOM

WIDE = GOLDEN / "images/wide_rgb.png"


@pytest.mark.parametrize("lengths", [[9], [9, 9], [12, 3, 7, 1]])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 48},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ],
)
def test_logits_are_those_of_the_model(shape: dict[str, Any], lengths: list[int], loaded: LoadedModel) -> None:
    compare(make_model(loaded, **shape), lengths)


def test_logits_are_those_of_the_model_after_the_buffers_and_the_mask_have_grown(loaded: LoadedModel) -> None:
    compare(make_model(loaded, num_hidden_layers=1), [8, 3], num_steps=2 * ROOM)


@pytest.mark.parametrize("lengths", [[9], [12, 3]])
def test_logits_in_bfloat16_are_those_of_the_model(lengths: list[int], loaded: LoadedModel) -> None:
    small = make_model(loaded, initializer_range=0.1)
    small.model.to(torch.bfloat16)
    compare(small, lengths, atol=0.1, rtol=0.05)


def test_logits_of_an_unmerged_adapter_are_those_of_the_model(loaded: LoadedModel) -> None:
    small = make_model(loaded)
    base = small.model.lm_head.weight.clone()
    targets = LoraConfig(r=4, target_modules=r".*layers\.\d+\..*_proj|lm_head", init_lora_weights=False)
    adapted = get_peft_model(small.model, targets).get_base_model()
    assert supports(adapted)
    compare(small, [9, 4])
    assert torch.equal(adapted.lm_head.base_layer.weight, base)


class InFloat32(nn.Module):
    """A projection whose products are computed in float32, whatever the dtype of the weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.to(torch.bfloat16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states.float(), self.linear.weight.float())


def test_projections_of_any_class_are_called(loaded: LoadedModel) -> None:
    small = make_model(loaded)
    for layer in small.model.model.layers:
        for name, projection in [*layer.self_attn.named_children(), *layer.mlp.named_children()]:
            if isinstance(projection, nn.Linear):
                setattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name, InFloat32(projection))
    assert supports(small.model)
    compare(small, [9])


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def patch(module: nn.Module) -> None:
    module.forward = module.forward  # as accelerate does


@pytest.mark.parametrize("change", [hook, pre_hook, patch])
@pytest.mark.parametrize("name", ["", "model", "model.layers.1", "model.layers.2.self_attn", "model.layers.0.mlp"])
def test_changed_modules_that_the_step_replaces_are_not_supported(name: str, change: Any, loaded: LoadedModel) -> None:
    model = make_model(loaded).model
    assert supports(model)
    change(model.get_submodule("model.layers.1.mlp.up_proj"))
    assert supports(model)
    change(model.get_submodule(name))
    assert not supports(model)


def test_other_attention_kernels_and_training_are_not_supported(loaded: LoadedModel) -> None:
    model = make_model(loaded).model
    assert not supports(model.train())
    model.eval().config._attn_implementation = "eager"
    assert not supports(model)


def test_a_model_that_recorded_hidden_states_is_supported(loaded: LoadedModel) -> None:
    model = make_model(loaded).model
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert supports(model)


@pytest.fixture
def hooked(loaded: LoadedModel) -> Iterator[LoadedModel]:
    handle = loaded.model.model.layers[1].register_forward_hook(lambda *_: None)
    yield loaded
    handle.remove()


def test_an_unsupported_model_gives_the_same_answers(hooked: LoadedModel) -> None:
    def answer(supported: bool) -> list[str]:
        engine = Engine(hooked)
        assert engine._is_supported is False
        engine._is_supported = supported
        requests = [("What is this?", WIDE), ("hello", None), ("你好", None)]
        states = [Chat(hooked).begin(*asked, temperature=0, max_new_tokens=8) for asked in requests]
        for state in states:
            engine.add(state)
        while len(engine):
            engine.step()
        return [state.text for state in states]

    assert answer(supported=False) == answer(supported=True)


def test_kernels_come_back_when_the_last_user_leaves() -> None:
    with native_matrix_vector:
        native_matrix_vector.__enter__()
        assert not torch.backends.mkldnn.enabled
        native_matrix_vector.__exit__()
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


def test_the_cpu_decoding_kernels_change_no_numbers() -> None:
    """Decoding steps with native matrix-vector kernels against one pass over the whole sequence."""
    loaded = load_model(CHECKPOINT, device="cpu", dtype="bfloat16")
    state = Chat(loaded).begin("What is this?", WIDE, temperature=0, max_new_tokens=8)
    steps: list[torch.Tensor] = []
    uses_onednn: list[bool] = []
    handle = loaded.model.lm_head.register_forward_hook(lambda *given: steps.append(given[2].view(1, -1)))
    switch = loaded.model.lm_head.register_forward_hook(
        lambda *_: uses_onednn.append(bool(torch.backends.mkldnn.enabled))
    )
    assert "".join(decode(loaded, state)) == state.text
    handle.remove()
    switch.remove()
    ids = torch.tensor([state.input_ids + state.new_ids])
    with torch.no_grad():
        fused = loaded.model.fuse(ids, image_features=state.features.clone() if state.features is not None else None)
        whole = loaded.model(inputs_embeds=fused.inputs_embeds).logits[0]
    expected = whole[len(state.keys) - 1 : -1].float()
    torch.testing.assert_close(torch.cat(steps).float(), expected, atol=0.25, rtol=0.05)  # bfloat16 rounding
    assert uses_onednn == [True] + [False] * (len(steps) - 1)
    assert torch.backends.mkldnn.enabled
