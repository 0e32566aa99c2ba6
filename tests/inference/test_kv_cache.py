"""The growing cache equals a concatenating one after every operation of transformers."""

import torch
from transformers import DynamicCache

from yivl.inference.kv_cache import ROOM, make_cache


def states(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 4)


def test_the_growing_cache_equals_a_concatenating_cache() -> None:
    ours, reference = make_cache(), DynamicCache()
    for length in (5, 1, 1, ROOM, 1, 2 * ROOM, 3):
        keys, values = states(length)
        for mine, expected in zip(ours.update(keys, values, 0), reference.update(keys, values, 0), strict=True):
            assert torch.equal(mine, expected)
        assert ours.get_seq_length() == reference.get_seq_length()


def test_crop_reorder_and_repeat_equal_a_concatenating_cache() -> None:
    ours, reference = make_cache(), DynamicCache()
    changes = [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([3, 0])),
        lambda cache: cache.crop(-2),
    ]
    batch = 2
    for change in changes:
        keys, values = states(6, batch)
        for mine, expected in zip(ours.update(keys, values, 0), reference.update(keys, values, 0), strict=True):
            assert torch.equal(mine, expected)
        change(ours)
        change(reference)
        batch = len(ours.layers[0].keys)


def test_a_decoding_step_writes_in_place() -> None:
    cache = make_cache()
    keys, _ = cache.update(*states(5), 0)
    grown, _ = cache.update(*states(1), 0)
    assert grown.data_ptr() == keys.data_ptr()
