"""Patterns that stand for several paths: ranges of numbers in braces, and those of ``glob``."""

import glob
import math
import os
import re
from itertools import product
from typing import Final

from yivl.errors import RowError

MAX_PATHS: Final = 1_000_000
"""Largest number of paths of one pattern; LAION-5B has 232,320 shards. Source: ours."""


def expand_braces(pattern: str) -> list[str]:
    """Return the paths of a pattern with ``{00000..00099}`` ranges, the naming of img2dataset shards.

    A file that has such a name is one path.

    >>> expand_braces("{08..10}.tar")
    ['08.tar', '09.tar', '10.tar']

    Raises:
        RowError: If the pattern names no path, or more than ``MAX_PATHS``.
    """
    if os.path.exists(pattern):
        return [pattern]
    parts = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    number = math.prod(max(int(last) - int(first) + 1, 0) for first, last in zip(parts[1::3], parts[2::3], strict=True))
    if not 0 < number <= MAX_PATHS:
        raise RowError(f"{pattern}: names {number:,} paths; expected 1 to {MAX_PATHS:,}")
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[0::3]
    return ["".join(a + b for a, b in zip(texts, [*numbers, ""], strict=True)) for numbers in product(*ranges)]


def matching_paths(pattern: str) -> list[str]:
    """Return the paths that exist of a pattern of ``glob``, sorted; a file that has such a name is one path."""
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
