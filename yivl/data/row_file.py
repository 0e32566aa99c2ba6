"""The rows of one file: validated once, parsed on access."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from yivl.data.orders import index_type
from yivl.data.records import Records, open_records
from yivl.data.row_cache import build_once, map_blocks
from yivl.data.rows import EMPTY_ANSWER, OPENING_ANSWER, OUTSIDE_IMAGE, Row, parse_row
from yivl.errors import RowError

if TYPE_CHECKING:
    from yivl.data.encoding import Encoder

_VERSION: Final = 1
"""Of what is known of rows; raise it when the same records yield other rows, reasons, notices or sequence lengths."""

# What is known of a valid row without parsing it.
HAS_IMAGES, HAS_PATHS, OPENS, IS_EMPTY, MAY_BE_OUTSIDE, IS_OUTSIDE = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True)
class RowFile:
    """The valid rows of one file, and why the others are invalid."""

    records: Records
    image_folder: str
    folder: Path
    """Of what is known of the rows, in the cache."""

    @cached_property
    def places(self) -> Any:
        """Places of the valid rows among the records, ``(rows,)`` int64; a ``range`` if all are valid."""
        path = self.folder / "places.npy"
        return np.load(path, mmap_mode="r") if path.is_file() else range(len(self.records))

    @cached_property
    def flags(self) -> np.ndarray:
        """What is known of the valid rows, ``(rows,)`` uint8."""
        flags: np.ndarray = np.load(self.folder / "flags.npy", mmap_mode="r")
        if not (flags & MAY_BE_OUTSIDE).any():
            return flags
        # The image folder may have moved since the rows were read.
        place = hashlib.sha256(os.path.abspath(self.image_folder).encode("utf-8", "surrogateescape")).hexdigest()
        return self._cached(f"outside-{place}", partial(_find_outside, self, flags), "images outside the folder")

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        # The arrays are mapped again: pickled, they would be copied into every data-loading worker.
        return {name: value for name, value in vars(self).items() if name not in ("places", "flags")}

    def parse(self, index: int) -> Row:
        """Return a valid row."""
        return self.parse_record(int(self.places[index]))

    def parse_record(self, place: int) -> Row:
        """Return the row of a record.

        Raises:
            RowError: If it is invalid.
        """
        return parse_row(self.records[place], self.records.origin(place), self.image_folder)

    def errors(self, *, allow_outside: bool) -> Iterator[RowError]:
        """Yield why rows are not used, in their order: the invalid ones, and those with images outside the folder."""
        reasons = dict(json.loads((self.folder / "invalid.json").read_text(encoding="utf-8")))
        outside = {} if allow_outside else {int(self.places[index]): index for index in self._outside()}
        for place in sorted(reasons.keys() | outside.keys()):
            reason = reasons[place] if place in reasons else self._describe_outside(outside[place])
            yield RowError(f"{self.records.origin(place)}: {reason}")

    def inside(self) -> np.ndarray | None:
        """Return the indices of the valid rows without images outside the folder; ``None`` if these are all."""
        if not len(self._outside()):
            return None
        return np.flatnonzero(self.flags & IS_OUTSIDE == 0).astype(index_type(len(self)))

    def lengths(self, encoder: "Encoder") -> np.ndarray:
        """Return the sequence length of every valid row, ``(rows,)`` int32, computed once and cached."""
        if not len(self):
            return np.empty(0, np.int32)
        compute = partial(_compute_lengths, self, encoder)
        return self._cached(f"lengths-{encoder.fingerprint}", compute, "sequence lengths")

    def _outside(self) -> np.ndarray:
        return np.flatnonzero(self.flags & IS_OUTSIDE)

    def _describe_outside(self, index: int) -> str:
        folder = os.path.abspath(self.image_folder)
        paths = [str(image) for image in self.parse(index).images if isinstance(image, Path)]
        image = next(path for path in paths if not Path(os.path.abspath(path)).is_relative_to(folder))
        return (
            f"the image {image} is outside the image folder {self.image_folder}; name the folder that holds all images "
            "(--image_folder), or allow it by --allow_outside_images"
        )

    def _cached(self, name: str, compute: Callable[[range], np.ndarray], description: str) -> np.ndarray:
        """Return an array with one value for each valid row, computed once."""

        def build(folder: Path) -> None:
            np.save(folder / "values.npy", np.concatenate(list(map_blocks(compute, len(self), description))))

        values: np.ndarray = np.load(build_once(f"{self.folder.name}-{name}", build) / "values.npy", mmap_mode="r")
        return values


def _find_outside(file: RowFile, flags: np.ndarray, block: range) -> np.ndarray:
    """Return the flags of a block of rows, with ``IS_OUTSIDE``."""
    found = flags[block.start : block.stop].copy()
    for offset in np.flatnonzero(found & MAY_BE_OUTSIDE):
        if OUTSIDE_IMAGE in file.parse(block[offset]).notices:
            found[offset] |= IS_OUTSIDE
    return found


def _compute_lengths(file: RowFile, encoder: "Encoder", block: range) -> np.ndarray:
    return np.array([encoder.sequence_length(file.parse(index)) for index in block], dtype=np.int32)


def open_rows(path: str, image_folder: str) -> RowFile:
    """Return the rows of a file or data set; what was found out about the same content before is not repeated.

    Raises:
        RowError: If it cannot be read, is not of its type, or has no rows.
        OSError: If the disk of the cache is full.
    """
    records = open_records(path)
    folder = build_once(f"{records.fingerprint}-rows-{_VERSION}", partial(_write_index, records))
    return RowFile(records, image_folder, folder)


def _write_index(records: Records, folder: Path) -> None:
    """Write what is known of the rows of a file: the places and flags of the valid ones, the reasons of the others."""
    number = len(records)
    if not number:
        raise RowError(f"{records.path}: no rows")
    file = RowFile(records, ".", folder)
    places = np.empty(number, dtype=np.int64)
    flags = np.empty(number, dtype=np.uint8)
    reasons: list[tuple[int, str]] = []
    count = 0
    for found, invalid in map_blocks(partial(_inspect, file), number, f"checking {records.path}"):
        stop = count + len(found)
        places[count:stop], flags[count:stop] = found.T
        reasons += invalid
        count = stop
    np.save(folder / "flags.npy", flags[:count])
    if reasons:
        np.save(folder / "places.npy", places[:count])
    (folder / "invalid.json").write_text(json.dumps(reasons), encoding="utf-8")


def _inspect(file: RowFile, block: range) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Return the places and flags of the valid rows of a block, ``(rows, 2)``, and the reasons of the others."""
    valid: list[tuple[int, int]] = []
    invalid: list[tuple[int, str]] = []
    for place in block:
        try:
            row = file.parse_record(place)
        except RowError as error:
            invalid.append((place, str(error).removeprefix(f"{file.records.origin(place)}: ")))
        else:
            valid.append((place, _flags_of(row)))
    return np.array(valid, dtype=np.int64).reshape(-1, 2), invalid


def _flags_of(row: Row) -> int:
    paths = [str(image) for image in row.images if isinstance(image, Path)]
    return (
        HAS_IMAGES * bool(row.images)
        + HAS_PATHS * bool(paths)
        + OPENS * (OPENING_ANSWER in row.notices)
        + IS_EMPTY * (EMPTY_ANSWER in row.notices)
        + MAY_BE_OUTSIDE * any(os.path.isabs(path) or ".." in path for path in paths)
    )
