"""Tables of rows that grow neither memory nor start-up time with the data."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from yivl.data.orders import index_type
from yivl.data.row_cache import BLOCK
from yivl.data.row_file import HAS_IMAGES, HAS_PATHS, IS_EMPTY, IS_OUTSIDE, OPENS, RowFile
from yivl.data.rows import EMPTY_ANSWER, OPENING_ANSWER, OUTSIDE_IMAGE, Row, summarize_notice

if TYPE_CHECKING:
    from yivl.data.encoding import Encoder

_NOTICES: Final = ((OPENS, OPENING_ANSWER), (IS_EMPTY, EMPTY_ANSWER), (IS_OUTSIDE, OUTSIDE_IMAGE))


class RowTable(Sequence[Row]):
    """Rows of several files, one file after the other; each is parsed when it is accessed."""

    def __init__(self, parts: Sequence[tuple[RowFile, np.ndarray | None]]) -> None:
        """Set the files, and the indices of the rows that are used of each; ``None`` is all."""
        self.parts = parts
        sizes = [len(file if indices is None else indices) for file, indices in parts]
        self._starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "RowTable": ...

    def __getitem__(self, index: int | slice) -> "Row | RowTable":
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        index = range(len(self))[index]
        part = bisect_right(self._starts, index) - 1
        file, indices = self.parts[part]
        index -= self._starts[part]
        return file.parse(index if indices is None else int(indices[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> "RowTable":
        """Return a table of some rows, given in ascending order."""
        wanted = np.asarray(indices, dtype=index_type(len(self)))
        bounds = np.searchsorted(wanted, self._starts)
        parts = []
        for (file, kept), offset, start, stop in zip(self.parts, self._starts, bounds, bounds[1:], strict=False):
            inner = wanted[start:stop] - offset
            parts.append((file, inner if kept is None else kept[inner]))
        return RowTable(parts)

    @property
    def fingerprint(self) -> str:
        """Hash of the contents of all files, whatever their names."""
        return hashlib.sha256("".join(file.records.fingerprint for file, _ in self.parts).encode()).hexdigest()

    @property
    def has_images(self) -> np.ndarray:
        """Whether each row has an image, ``(rows,)`` uint8."""
        return self._flags() & HAS_IMAGES

    def lengths(self, encoder: "Encoder") -> np.ndarray:
        """Return the sequence length of every row, ``(rows,)`` int32."""
        return self._gather([file.lengths(encoder) for file, _ in self.parts], np.int32)

    def first_images(self, count: int) -> list[Path]:
        """Return the paths of the first images that are files."""
        flags = self._flags()
        blocks = ((start, flags[start : start + BLOCK]) for start in range(0, len(flags), BLOCK))  # most need only one
        indices = (start + int(offset) for start, block in blocks for offset in np.flatnonzero(block & HAS_PATHS))
        images = (image for index in indices for image in self[index].images if isinstance(image, Path))
        return list(islice(images, count))

    def notices(self) -> list[str]:
        """Return one line for each kind of notice, with the number of rows and the first of them."""
        flags = self._flags()
        found = {text: np.flatnonzero(flags & flag) for flag, text in _NOTICES}
        present = sorted((text for text in found if len(found[text])), key=lambda text: int(found[text][0]))
        return [
            summarize_notice(text, len(found[text]), [self[int(index)].origin for index in found[text][:5]])
            for text in present
        ]

    def _flags(self) -> np.ndarray:
        return self._gather([file.flags for file, _ in self.parts], np.uint8)

    def _gather(self, values: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        """Return the values of the rows that are used, of the values of all rows of every file."""
        used = [
            of_file if kept is None else of_file[kept] for of_file, (_, kept) in zip(values, self.parts, strict=True)
        ]
        return used[0] if len(used) == 1 else np.concatenate([np.empty(0, dtype), *used])


def join(tables: Sequence[RowTable]) -> RowTable:
    """Return one table of the rows of several."""
    return RowTable([part for table in tables for part in table.parts])
