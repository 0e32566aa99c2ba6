"""The estimated memory of the released models' layers against the peak of traced steps, whose tensors hold no data."""

import weakref
from typing import Any

import pytest
import torch
from support.golden import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama

from yivl.model.architectures import model_class
from yivl.model.loss import cross_entropy_sum
from yivl.train import parameters
from yivl.train.plan import Zero

TEXT, TARGETS = 264, 200


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations return, as long as these exist, and keeps the peak.

    ``torch.distributed._tools.mem_tracker`` does so too, but cannot track models with frozen parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.total -= self.live.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return what the fused kernel of a GPU does; without data, PyTorch would choose the one with all products."""
    assert kwargs["attn_mask"] is None
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, kwargs["dropout_p"], kwargs["is_causal"], scale=kwargs["scale"]
    )[0]
    return output


def with_fake_weights(model: torch.nn.Module) -> None:
    """Replace the weights, which are on the meta device, by fake tensors of a device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def traced_peak(run: Any, micro_batches: int) -> int:
    """Return the peak of the second of two optimizer steps, in bytes, without padding."""
    config, training = run.config, run.arguments.training
    config.use_cache = False
    samples, size = training.per_device_train_batch_size, config.vision_config.image_size
    with torch.device("meta"):
        model: Any = model_class(config)(config).to(torch.bfloat16).train()
        model, _ = parameters.set_up_model(model, run.arguments, base="m")
    parameters.freeze_modes(parameters.frozen_modules(model))
    core = model.get_base_model() if run.arguments.model.lora_enable else model
    with FakeTensorMode(allow_non_fake_inputs=True):
        with_fake_weights(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, counter = torch.optim.AdamW(trained, fused=True), LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor)
        with counter:
            for _ in range(2):
                for _ in range(micro_batches):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        features = core.encode_images(torch.empty(samples, 3, size, size, dtype=torch.bfloat16))
                        text = core.get_input_embeddings()(torch.empty(samples, TEXT, dtype=torch.long))
                        embeddings = torch.cat([features.to(text.dtype), text], 1)
                        hidden = core.model(inputs_embeds=embeddings).last_hidden_state[:, -TARGETS:]
                        # `supervised_loss` selects positions by the values of the labels.
                        labels = torch.empty(samples * TARGETS, dtype=torch.long)
                        cross_entropy_sum(core.lm_head(hidden.flatten(0, 1)), labels).backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return counter.peak


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)  # as for rows without padding


@pytest.mark.parametrize(
    ("flags", "micro_batches", "layers"),
    [
        ("--freeze_mm_mlp_adapter True --gradient_checkpointing True", 1, 2),
        ("--freeze_mm_mlp_adapter True --gradient_checkpointing True", 2, 2),
        ("--freeze_mm_mlp_adapter True --per_device_train_batch_size 4", 1, 2),
        pytest.param(
            "--lora_enable True --freeze_mm_mlp_adapter True --per_device_train_batch_size 8",
            1,
            8,
            marks=pytest.mark.slow,
        ),
        ("--stage 2 --per_device_train_batch_size 8 --gradient_checkpointing True", 1, 2),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_traced_peak(flags: str, micro_batches: int, layers: int) -> None:
    from hardware_table import FIELDS_6B, describe

    flags += f" --gradient_accumulation_steps {micro_batches} --model_max_length {1024 + TEXT}"
    if "--stage" in flags:
        flags += " --vision_gradient_checkpointing True --global_batch_size 8"
    run = describe(flags, FIELDS_6B | {"num_hidden_layers": layers}, {"num_hidden_layers": 6})
    assert run.memory(Zero(), 1).total == pytest.approx(traced_peak(run, micro_batches), rel=0.1)


@pytest.mark.parametrize(
    "flags",
    [
        "--unfreeze_mm_vision_tower True --freeze_backbone True --per_device_train_batch_size 8",
        "--unfreeze_mm_vision_tower True --gradient_checkpointing True --vision_gradient_checkpointing True",
    ],
)
def test_the_estimate_of_an_internvl_is_within_a_tenth_too(flags: str) -> None:
    from hardware_table import describe_internvl

    flags += f" --gradient_checkpointing True --drop_path_rate 0.4 --model_max_length {256 + TEXT}"
    run = describe_internvl(flags, {"num_hidden_layers": 2}, {"num_hidden_layers": 6})
    assert run.memory(Zero(), 1).total == pytest.approx(traced_peak(run, 1), rel=0.1)
