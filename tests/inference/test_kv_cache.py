"""The growing cache equals a concatenating one after every operation of transformers."""

import pytest
import torch
from transformers import DynamicCache

from yivl.inference.kv_cache import ROOM, PrefixCache, copy_row, make_cache


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


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [([1, 2, 3, 9, 5, 6], 3), ([1, 2, 3, 4, 5, 6, 7], 6), ([1, 2, 3, 4, 5, 6], 5), ([9, 2], 0), ([1], 0)],
)
def test_a_prefix_cache_gives_the_longest_common_prefix_and_leaves_the_last_position(
    prompt: list[int], shared: int
) -> None:
    cache, prefix = make_cache(), PrefixCache()
    keys, _ = cache.update(*states(6, 1), 0)
    prefix.put(cache, [1, 2, 3, 4, 5, 6])
    assert prefix.num_bytes == 2 * 3 * (6 + ROOM) * 4 * 4
    taken, length = prefix.take(prompt)
    assert (length, taken.get_seq_length(), prefix.num_bytes) == (shared, shared, 0)
    if shared:
        assert torch.equal(taken.layers[0].keys, keys[:, :, :shared])
    assert prefix.take(prompt)[1] == 0  # it belongs to the request that took it


def test_a_copied_row_is_independent_of_the_batch() -> None:
    batch = make_cache()
    keys, values = batch.update(*states(6, 3), 0)
    row = copy_row(batch, 1, 4)
    assert torch.equal(row.layers[0].keys, keys[1:2, :, 2:])
    assert torch.equal(row.layers[0].values, values[1:2, :, 2:])
    row.layers[0].keys.zero_()
    assert keys.ne(0).all()
