"""The estimated memory of a run, against what a layer saves and the optimizer holds."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.golden import CHECKPOINT
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from yivl.checkpoint.loading import read_small_files
from yivl.model.configuration import YiVLConfig
from yivl.model.decoder import DecoderLayer
from yivl.train.arguments import Arguments, parse_arguments
from yivl.train.dry_run import Memory, estimate_memory
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


def test_8_bit_optimizer_states_need_a_quarter() -> None:
    config, _, _ = read_small_files(CHECKPOINT)
    usual, small = estimate(config, []), estimate(config, ["--optim", "adamw_bnb_8bit"])
    assert usual.optimizer == 4 * small.optimizer == 8_000_000
    assert replace(usual, optimizer=0.0) == replace(small, optimizer=0.0)
