"""Random orders and subsets of rows, in 4 bytes for each row; lists would take 36."""

import math
import random
from array import array

import numpy as np


def index_type(number: int) -> str:
    """Return the type code of the indices of ``number`` rows: 4 bytes, or 8 from 2**31 rows on."""
    return "i" if number < 2**31 else "q"


def shuffled(number: int, seed: str) -> "array[int]":
    """Return the indices of ``number`` rows in a random order."""
    indices = array(index_type(number), range(number))
    random.Random(seed).shuffle(indices)
    return indices


def subsample(number: int, count: int, seed: int | str) -> "array[int]":
    """Return ``count`` random indices of ``number`` rows, ascending: those of ``random.Random(seed).sample``.

    Both ways are those of ``sample``: few indices are drawn again if they repeat, and many from a pool. Here, one byte
    for each row remembers them, and the end of the pool.
    """
    chosen = array(index_type(number))
    if not count:
        return chosen
    draw = random.Random(seed).randrange
    if number > _largest_pool(count):
        is_chosen = bytearray(number)
        for _ in range(count):
            index = draw(number)
            while is_chosen[index]:
                index = draw(number)
            is_chosen[index] = 1
        found = np.flatnonzero(np.frombuffer(is_chosen, np.uint8))
        chosen.frombytes(found.astype(chosen.typecode).tobytes())
        return chosen
    pool = array(chosen.typecode, range(number))
    for last in range(number - 1, number - 1 - count, -1):
        index = draw(last + 1)
        pool[index], pool[last] = pool[last], pool[index]
    del pool[: number - count]
    np.frombuffer(pool, pool.typecode).sort()
    return pool


def _largest_pool(count: int) -> int:
    """Return the number of rows up to which ``random.sample`` draws from a pool. Source: CPython's ``random.py``."""
    size = 21
    if count > 5:
        size += 4 ** math.ceil(math.log(count * 3, 4))
    return size
