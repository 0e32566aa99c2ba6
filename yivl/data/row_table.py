"""Tables of rows that grow neither memory nor start-up time with the data: cached on disk, parsed on access."""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from yivl.data.json_texts import check_regular, parse_text, read_texts, row_unit
from yivl.data.row_cache import build_once, content_hash, map_blocks
from yivl.data.rows import EMPTY_ANSWER, OPENING_ANSWER, OUTSIDE_IMAGE, Row, parse_row, summarize_notice
from yivl.errors import RowError

if TYPE_CHECKING:
    from yivl.data.encoding import Encoder

logger = logging.getLogger(__name__)

_VERSION: Final = 1
"""Of the cache; raise it when the same file yields other rows, reasons, notices or sequence lengths."""

_BATCH: Final = 2**22
"""Characters that are written at once. Source: ours."""

# What is known of a valid row without parsing it.
_HAS_IMAGES, _HAS_PATHS, _OPENS, _IS_EMPTY, _MAY_BE_OUTSIDE, _IS_OUTSIDE = 1, 2, 4, 8, 16, 32
_NOTICES: Final = ((_OPENS, OPENING_ANSWER), (_IS_EMPTY, EMPTY_ANSWER), (_IS_OUTSIDE, OUTSIDE_IMAGE))


@dataclass(frozen=True)
class RowFile:
    """The valid rows of one file, and why the others are invalid."""

    path: str
    """As given, for messages."""
    image_folder: str
    records: Any
    """``datasets.Dataset`` of the ``number`` and the JSON ``text`` of every row, valid or not."""
    fingerprint: str
    """SHA-256 of the file."""
    key: str
    """Of the cache."""
    folder: Path
    """Of what is known of the rows."""

    @cached_property
    def places(self) -> Any:
        """Places of the valid rows among the records, ``(rows,)`` int64; a ``range`` if all are valid."""
        path = self.folder / "places.npy"
        return np.load(path, mmap_mode="r") if path.is_file() else range(len(self.records))

    @cached_property
    def flags(self) -> np.ndarray:
        """What is known of the valid rows, ``(rows,)`` uint8."""
        flags: np.ndarray = np.load(self.folder / "flags.npy", mmap_mode="r")
        if not (flags & _MAY_BE_OUTSIDE).any():
            return flags
        # The image folder may have moved since the rows were read.
        place = hashlib.sha256(os.path.abspath(self.image_folder).encode("utf-8", "surrogateescape")).hexdigest()
        return self._cached(f"outside-{place}", partial(_find_outside, self, flags), "images outside the folder")

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        # The arrays are mapped again: pickled, they would be copied into every data-loading worker.
        return {name: value for name, value in vars(self).items() if name not in ("places", "flags")}

    def origin(self, place: int) -> str:
        """Return the origin of a record, for messages."""
        return f"{self.path} {row_unit(self.path)} {self.records.data.column('number')[place].as_py()}"

    def parse(self, index: int) -> Row:
        """Return a valid row."""
        return self.parse_record(int(self.places[index]))

    def parse_record(self, place: int) -> Row:
        """Return the row of a record.

        Raises:
            RowError: If it is invalid.
        """
        text = self.records.data.column("text")[place].as_py()
        return parse_row(parse_text(text), self.origin(place), self.image_folder)

    def errors(self, *, allow_outside: bool) -> Iterator[RowError]:
        """Yield why rows are not used, in their order: the invalid ones, and those with images outside the folder."""
        reasons = dict(json.loads((self.folder / "invalid.json").read_text(encoding="utf-8")))
        outside = {} if allow_outside else {int(self.places[index]): index for index in self._outside()}
        for place in sorted(reasons.keys() | outside.keys()):
            reason = reasons[place] if place in reasons else self._describe_outside(outside[place])
            yield RowError(f"{self.origin(place)}: {reason}")

    def inside(self) -> np.ndarray | None:
        """Return the indices of the valid rows without images outside the folder; ``None`` if these are all."""
        return np.flatnonzero(self.flags & _IS_OUTSIDE == 0) if len(self._outside()) else None

    def lengths(self, encoder: "Encoder") -> np.ndarray:
        """Return the sequence length of every valid row, ``(rows,)`` int32, computed once and cached."""
        compute = partial(_compute_lengths, self, encoder)
        return self._cached(f"lengths-{encoder.fingerprint}", compute, "sequence lengths")

    def _outside(self) -> np.ndarray:
        return np.flatnonzero(self.flags & _IS_OUTSIDE)

    def _describe_outside(self, index: int) -> str:
        folder = os.path.abspath(self.image_folder)
        paths = [str(image) for image in self.parse(index).images if isinstance(image, Path)]
        image = next(path for path in paths if not Path(os.path.abspath(path)).is_relative_to(folder))
        return (
            f"the image {image} is outside the image folder {self.image_folder}; name the folder that holds all images "
            "(--image_folder), or allow it by --allow_outside_images"
        )

    def _cached(self, name: str, compute: Any, description: str) -> np.ndarray:
        """Return an array with one value for each valid row, computed once."""

        def build(folder: Path) -> None:
            np.save(folder / "values.npy", np.concatenate(list(map_blocks(compute, len(self), description))))

        values: np.ndarray = np.load(build_once(f"{self.key}-{name}", build) / "values.npy", mmap_mode="r")
        return values


def _find_outside(file: RowFile, flags: np.ndarray, block: range) -> np.ndarray:
    """Return the flags of a block of rows, with ``_IS_OUTSIDE``."""
    found = flags[block.start : block.stop].copy()
    for offset in np.flatnonzero(found & _MAY_BE_OUTSIDE):
        if OUTSIDE_IMAGE in file.parse(block[offset]).notices:
            found[offset] |= _IS_OUTSIDE
    return found


def _compute_lengths(file: RowFile, encoder: "Encoder", block: range) -> np.ndarray:
    return np.array([encoder.sequence_length(file.parse(index)) for index in block], dtype=np.int32)


def open_rows(path: str, image_folder: str) -> RowFile:
    """Return the rows of a file, from the cache if a file of the same content was read before.

    Raises:
        RowError: If the file cannot be read, is not JSON, or has no rows.
        OSError: If the cache cannot be written.
    """
    try:
        check_regular(path)
        fingerprint = content_hash(path)
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror})") from error
    key = f"{fingerprint}-{row_unit(path)}-{_VERSION}"

    def build(folder: Path) -> None:
        _write_records(path, folder / "rows.arrow")
        if content_hash(path) != fingerprint:
            raise RowError(f"{path}: changed while it was read; start again when it is complete")
        records = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        _write_index(RowFile(path, ".", records, fingerprint, key, folder))

    folder = build_once(key, build)
    records = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return RowFile(path, image_folder, records, fingerprint, key, folder)


def _write_records(path: str, target: Path) -> None:
    """Write number and text of every row of a JSON file."""
    features = datasets.Features({"number": datasets.Value("int64"), "text": datasets.Value("large_string")})
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    with ArrowWriter(path=str(target), features=features) as writer:
        for number, text in tqdm(read_texts(path), desc=f"reading {path}", unit="row", disable=None, delay=2):
            numbers.append(number)
            texts.append(text)
            size += len(text)
            if size > _BATCH:
                writer.write_batch({"number": numbers, "text": texts})
                numbers, texts, size = [], [], 0
        writer.write_batch({"number": numbers, "text": texts})
        writer.finalize()


def _write_index(file: RowFile) -> None:
    """Write what is known of the rows of a file: the places and flags of the valid ones, the reasons of the others."""
    number = len(file.records)
    places = np.empty(number, dtype=np.int64)
    flags = np.empty(number, dtype=np.uint8)
    reasons: list[tuple[int, str]] = []
    count = 0
    for found, invalid in map_blocks(partial(_inspect, file), number, f"checking {file.path}"):
        stop = count + len(found)
        places[count:stop], flags[count:stop] = found.T
        reasons += invalid
        count = stop
    np.save(file.folder / "flags.npy", flags[:count])
    if reasons:
        np.save(file.folder / "places.npy", places[:count])
    (file.folder / "invalid.json").write_text(json.dumps(reasons), encoding="utf-8")


def _inspect(file: RowFile, block: range) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Return the places and flags of the valid rows of a block, ``(rows, 2)``, and the reasons of the others."""
    valid: list[tuple[int, int]] = []
    invalid: list[tuple[int, str]] = []
    for place in block:
        try:
            row = file.parse_record(place)
        except RowError as error:
            invalid.append((place, str(error).removeprefix(f"{file.origin(place)}: ")))
        else:
            valid.append((place, _flags_of(row)))
    return np.array(valid, dtype=np.int64).reshape(-1, 2), invalid


def _flags_of(row: Row) -> int:
    paths = [str(image) for image in row.images if isinstance(image, Path)]
    return (
        _HAS_IMAGES * bool(row.images)
        + _HAS_PATHS * bool(paths)
        + _OPENS * (OPENING_ANSWER in row.notices)
        + _IS_EMPTY * (EMPTY_ANSWER in row.notices)
        + _MAY_BE_OUTSIDE * any(os.path.isabs(path) or ".." in path for path in paths)
    )


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
        wanted = np.asarray(indices, dtype=np.int64)
        bounds = np.searchsorted(wanted, self._starts)
        parts = []
        for (file, kept), offset, start, stop in zip(self.parts, self._starts, bounds, bounds[1:], strict=False):
            inner = wanted[start:stop] - offset
            parts.append((file, inner if kept is None else kept[inner]))
        return RowTable(parts)

    @property
    def fingerprint(self) -> str:
        """Hash of the contents of all files, whatever their names."""
        return hashlib.sha256("".join(file.fingerprint for file, _ in self.parts).encode()).hexdigest()

    @property
    def has_images(self) -> np.ndarray:
        """Whether each row has an image, ``(rows,)`` uint8."""
        return self._flags() & _HAS_IMAGES

    def lengths(self, encoder: "Encoder") -> np.ndarray:
        """Return the sequence length of every row, ``(rows,)`` int32."""
        return self._gather([file.lengths(encoder) for file, _ in self.parts], np.int32)

    def first_images(self, count: int) -> list[Path]:
        """Return the paths of the first images that are files."""
        found: list[Path] = []
        for index in np.flatnonzero(self._flags() & _HAS_PATHS):
            found += [image for image in self[int(index)].images if isinstance(image, Path)]
            if len(found) >= count:
                break
        return found[:count]

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
