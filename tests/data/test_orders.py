"""Random orders and subsets: those of lists, in the memory of arrays."""

import random
import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from yivl.data import streaming
from yivl.data.orders import shuffled, subsample
from yivl.data.sampler import BatchSampler
from yivl.data.sources import DataSource
from yivl.data.stream_position import Piece


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [1, 5, 20, 21, 22, 85, 86, 277, 1045, 5000])
def test_a_subset_is_that_of_random_sample(number: int) -> None:
    counts = {count for count in (0, 1, 5, 6, 21, 22, number // 3, number - 1, number) if count <= number}
    for count, seed in product(counts, (0, 7, "7 0 1")):
        expected = sorted(random.Random(seed).sample(range(number), count))
        assert subsample(number, count, seed).tolist() == expected


def test_an_order_is_that_of_a_shuffled_list() -> None:
    expected = list(range(1000))
    random.Random("3 1").shuffle(expected)
    assert shuffled(1000, "3 1").tolist() == expected


# Lists would take 36 bytes for each row: eight of a reference and 28 of an integer.
@pytest.mark.parametrize(("part", "limit"), [(0.9, 5), (0.1, 5), (0.001, 2)])
def test_a_subset_takes_few_bytes_for_each_row(part: float, limit: int) -> None:
    number = 200_000
    assert peak_bytes(lambda: subsample(number, int(number * part), 0)) < limit * number


def test_the_orders_of_an_epoch_take_few_bytes_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    number = 200_000
    sampler = BatchSampler([number], 8, samples_per_epoch=[number // 2])
    assert peak_bytes(lambda: next(iter(sampler))) < 10 * number  # the subset and its shuffled copy
    monkeypatch.setattr(streaming, "load_rows", lambda *_: range(number))
    reader = streaming._RowReader(DataSource("rows.json"), 0)
    assert peak_bytes(lambda: next(reader.read(0, Piece(0, 0, 0, 1, 0)))) < 6 * number
    (row,) = reader.read(0, Piece(0, 0, 5, 0, 0))
    assert row.row == shuffled(number, "0 0")[5]
