"""The estimated memory of a run, against what a layer saves and the optimizer holds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from yivl.checkpoint.loading import read_small_files
from yivl.model.configuration import YiVLConfig
from yivl.model.decoder import DecoderLayer
from yivl.model.modeling import YiVLForCausalLM
from yivl.train import parameters
from yivl.train.arguments import Arguments, parse_arguments
from yivl.train.memory import Memory, estimate_memory
from yivl.train.parameters import PartSize
from yivl.train.plan import Zero

LENGTH = 512
SIZES = [PartSize("language_model", 1_000_000, 1_000_000, 1e-5)]


def arguments(*flags: str) -> Arguments:
    required = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    return parse_arguments([*required, "--model_max_length", str(LENGTH), *flags])


def estimate(config: YiVLConfig, flags: Sequence[str]) -> Memory:
    return estimate_memory(SIZES, config, arguments(*flags), Zero(), 1)


def saved_bytes(config: YiVLConfig, dtype: torch.dtype) -> int:
    """Return the bytes that a trained decoder layer saves for the backward pass, without copies of its weights."""
    config._attn_implementation = "sdpa"
    layer = DecoderLayer(config, 0).train()
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    shapes = {shape for weight in layer.parameters() for shape in (weight.shape, weight.shape[::-1])}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(1, LENGTH, config.hidden_size, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None])
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        layer(hidden, position_embeddings=positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activations_of_a_layer_are_those_it_saves(dtype: torch.dtype) -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    flags = ["--bf16", str(dtype == torch.bfloat16)]
    more = YiVLConfig(**config.to_dict() | {"num_hidden_layers": config.num_hidden_layers + 1})
    estimated = estimate(more, flags).activations - estimate(config, flags).activations
    assert saved_bytes(config, dtype) == pytest.approx(estimated, rel=0.15)


@pytest.mark.parametrize(
    ("flags", "zero"),
    [
        (("--bf16", "True"), Zero()),
        (("--bf16", "True"), Zero(2)),
        (("--bf16", "True", "--lora_enable", "True"), Zero()),
        (("--bf16", "True", "--tune_mm_mlp_adapter", "True"), Zero()),
        ((), Zero()),
    ],
)
def test_a_checkpointed_layer_saves_the_residual_stream_in_the_dtype_it_has(flags: Sequence[str], zero: Zero) -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    parsed = arguments(*flags, "--gradient_checkpointing", "True")
    is_bf16 = bool(parsed.training.bf16)
    # As the trainer does it.
    model: Any = YiVLForCausalLM(config).to(torch.bfloat16 if is_bf16 else torch.float32)
    if parsed.model.lora_enable:
        model = parameters.add_adapters(model, parsed.model, base="m")
    parameters.select_trainable(model, parsed.model, config.num_vision_layers)
    if not zero.stage:
        parameters.upcast_trainable_params(model)
    inputs: list[torch.Tensor] = []
    last = [module for module in model.modules() if isinstance(module, DecoderLayer)][-1]
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16 and not zero.stage):
        model.train()(input_ids=torch.arange(10, 15)[None])
    sizes = parameters.part_sizes(model, parsed.training)
    more = YiVLConfig(**config.to_dict() | {"num_hidden_layers": config.num_hidden_layers + 1})
    found = [estimate_memory(sizes, other, parsed, zero, 1).activations for other in (config, more)]
    assert found[1] - found[0] == LENGTH * config.hidden_size * inputs[0].element_size()


def test_8_bit_optimizer_states_need_a_quarter_except_those_of_embeddings() -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    eight_bits = ["--optim", "adamw_bnb_8bit"]
    usual, small = estimate(config, []), estimate(config, eight_bits)
    assert usual.optimizer == 8_000_000
    assert small.optimizer == 2_000_000 + 6 * config.vocab_size * config.hidden_size
    assert replace(usual, optimizer=0.0) == replace(small, optimizer=0.0)
    assert estimate(config, [*eight_bits, "--lora_enable", "True"]).optimizer == 2_000_000  # no embedding is trained
    # DeepSpeed's optimizer does not know the embeddings.
    zero = estimate_memory(SIZES, config, arguments(*eight_bits, "--bf16", "True"), Zero(2), 1)
    assert zero.optimizer == (2 + 4) * 1_000_000
