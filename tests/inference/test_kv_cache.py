"""The growing cache equals a concatenating one after every operation of transformers."""

import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.chat import Chat
from yivl.inference.kv_cache import ROOM, PrefixStore, make_cache


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


def layers_of(keys: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values in which each position holds a number that depends on all keys up to it."""
    sums = torch.tensor([hash(tuple(keys[: index + 1])) % 10**6 for index in range(len(keys))], dtype=torch.float32)
    states = sums.view(1, 1, -1, 1).expand(1, 3, -1, 4)
    return [(states + layer, states + layer + 0.5) for layer in range(2)]


BYTES_PER_POSITION = 2 * 2 * 3 * 4 * 4  # keys and values, layers, heads, head_dim, float32


def assert_holds(cache: Cache, keys: Sequence[int]) -> None:
    assert cache.get_seq_length() == len(keys)
    for layer, (expected_keys, expected_values) in zip(cache.layers, layers_of(keys), strict=bool(keys)):
        assert torch.equal(layer.keys, expected_keys)
        assert torch.equal(layer.values, expected_values)


def stored(store: PrefixStore) -> list[weakref.ref[torch.Tensor]]:
    """Return references to all tensors of a store, which do not keep them."""
    return [weakref.ref(tensor) for node in store._parents for pair in node.layers for tensor in pair]


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [([1, 2, 3, 9, 5, 6], 3), ([1, 2, 3, 4, 5, 6, 7], 6), ([1, 2, 3, 4, 5, 6], 5), ([9, 2], 0), ([1], 0)],
)
def test_a_store_returns_the_longest_common_prefix_and_leaves_the_last_position(prompt: list[int], shared: int) -> None:
    store = PrefixStore(10**6)
    store.put([1, 2, 3, 4, 5, 6], layers_of([1, 2, 3, 4, 5, 6]))
    for _ in range(2):  # several requests share one prefix
        cache, length = store.take(prompt)
        assert length == shared
        assert_holds(cache, prompt[:shared])
    for layer in cache.layers:  # a copy: what a request does to its cache changes nothing else
        layer.keys.zero_()
    assert_holds(store.take(prompt)[0], prompt[:shared])


def test_a_sequence_that_is_stored_already_copies_nothing() -> None:
    store = PrefixStore(10**6)
    store.put([1, 2, 3, 4], layers_of([1, 2, 3, 4]))
    tensors = [tensor() for tensor in stored(store)]
    for keys in ([1, 2], [1, 2, 3, 4]):
        store.put(keys, layers_of(keys))
    assert all(now() is before for now, before in zip(stored(store), tensors, strict=True))


SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), max_size=20)


@given(sequences=SEQUENCES, prompt=st.lists(st.integers(1, 3), min_size=1, max_size=9))
def test_a_store_equals_a_search_over_all_sequences_and_stores_a_shared_prefix_once(
    sequences: list[list[int]], prompt: list[int]
) -> None:
    store = PrefixStore(10**9)
    for keys in sequences:
        store.put(keys, layers_of(keys))
    prefixes = {tuple(keys[:length]) for keys in sequences for length in range(1, len(keys) + 1)}
    assert store.num_bytes == len(prefixes) * BYTES_PER_POSITION
    expected = max((length for length in range(len(prompt)) if tuple(prompt[:length]) in prefixes), default=0)
    cache, length = store.take(prompt)
    assert length == expected
    assert_holds(cache, prompt[:expected])


@given(sequences=SEQUENCES, most=st.integers(0, 12))
def test_a_full_store_keeps_the_most_recent_sequence_and_its_limit(sequences: list[list[int]], most: int) -> None:
    store = PrefixStore(most * BYTES_PER_POSITION)
    for keys in sequences:
        before = store.num_bytes
        store.put(keys, layers_of(keys))
        assert store.num_bytes <= most * BYTES_PER_POSITION
        cache, length = store.take([*keys, 0])
        assert_holds(cache, keys[:length])
        assert length == len(keys) or (len(keys) > most and store.num_bytes == before)


def test_the_least_recently_used_sequence_is_dropped_first() -> None:
    store = PrefixStore(9 * BYTES_PER_POSITION)
    first, second, third, fourth = [1, 1, 1], [1, 2, 2], [3, 3, 3], [4, 4, 4]
    for keys in (first, second, third):
        store.put(keys, layers_of(keys))
    store.take([*first, 0])
    store.put(fourth, layers_of(fourth))
    kept = {
        name: store.take([*keys, 0])[1] for name, keys in (("1", first), ("2", second), ("3", third), ("4", fourth))
    }
    assert kept == {"1": 3, "2": 1, "3": 3, "4": 3}
    store.clear()
    assert (store.num_bytes, store.take([*first, 0])[1]) == (0, 0)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Objects in reference cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_cleared_store_frees_its_memory_at_once(no_collection: None) -> None:
    store = PrefixStore(10**6)
    for keys in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7]):
        store.put(keys, layers_of(keys))
    tensors = stored(store)
    assert len(tensors) == 5 * 2 * 2  # nodes, layers, keys and values
    store.clear()
    assert not any(tensor() is not None for tensor in tensors)


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_chat_that_is_reset_or_dropped_frees_its_memory_at_once(
    is_reset: bool, loaded: LoadedModel, no_collection: None
) -> None:
    chat = Chat(loaded)
    for _ in range(2):
        chat.ask("hello", temperature=0, max_new_tokens=3)
    tensors = stored(chat._prefixes)
    assert tensors
    if is_reset:
        chat.reset()
    else:
        del chat
    assert not any(tensor() is not None for tensor in tensors)
