"""Random models whose decoding steps are compared with one pass over each row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.cuda_graphs import GraphStep
from yivl.inference.decoding import DecodingStep
from yivl.inference.kv_cache import make_cache
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM

VOCABULARY = 96


def make_model(loaded: LoadedModel, **fields: Any) -> LoadedModel:
    """Return a model with random weights whose logits differ clearly between positions."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = YiVLConfig(
        **shape
        | {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "rope_theta": 5e6, "initializer_range": 0.2}
        | fields,
        mm_hidden_size=48,
        mm_vision_tower="./vit/tiny",
        vision_config=loaded.model.config.vision_config,
        max_position_embeddings=4096,
    )
    config._attn_implementation = "sdpa"
    model = YiVLForCausalLM(config)
    model.eval()
    return dataclasses.replace(loaded, model=model)


@torch.inference_mode()
def fill(model: YiVLForCausalLM, rows: Sequence[torch.Tensor]) -> Cache:
    """Return the cache of rows of different lengths, padded on the left with keys and values that must not be read."""
    caches, longest, batch = [], max(map(len, rows)), make_cache()
    for row in rows:
        caches.append(make_cache())
        model(input_ids=row[None], past_key_values=caches[-1], use_cache=True)
    for index in range(len(caches[0].layers)):
        parts = []
        for cache in caches:
            layer = cache.layers[index]
            pad = (0, 0, longest - layer.keys.shape[2], 0)
            parts.append([nn.functional.pad(states, pad, value=100.0) for states in (layer.keys, layer.values)])
        keys, values = zip(*parts, strict=True)
        batch.update(torch.cat(keys), torch.cat(values), index)
    return batch


@torch.inference_mode()
def compare(
    loaded: LoadedModel, lengths: Sequence[int], num_steps: int = 4, atol: float = 2e-5, rtol: float = 1e-5
) -> None:
    """Decode given tokens after rows of given lengths and compare the logits with one pass over each row alone."""
    model = loaded.model
    rows = [torch.randint(1, VOCABULARY, (length + num_steps,)) for length in lengths]
    cache = fill(model, [row[:length] for row, length in zip(rows, lengths, strict=True)])
    step = (GraphStep if loaded.decoding_graphs else DecodingStep)(loaded, lengths)
    steps = []
    for index in range(num_steps):
        tokens = [int(row[length + index]) for row, length in zip(rows, lengths, strict=True)]
        steps.append(step(tokens, cache))
    assert steps[0].dtype == model.lm_head(torch.zeros(1, model.config.hidden_size, dtype=model.dtype)).dtype
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = model(input_ids=row[None]).logits[0, length:]
        found = torch.stack([logits[number] for logits in steps])
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
