"""Turn the official files of a published data set into rows for training (docs/pretraining-data.md).

python -m yivl.data.prepare NAME --source FOLDER --output ROWS.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl import command_line
from yivl.errors import YiVLError

if TYPE_CHECKING:
    from yivl.data.prepare.catalog import PublishedSource
    from yivl.data.prepare.records import BadRecords


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    from yivl.data.prepare.catalog import SOURCES

    table = [("NAME", "stage", "rows", "license"), *((n, s.stages, s.size, s.license) for n, s in SOURCES.items())]
    parser = command_line.Parser(
        prog="python -m yivl.data.prepare",
        description=__doc__,
        epilog="\n".join("{:14} {:6} {:14} {}".format(*line) for line in table),
    )
    parser.add_argument("name", metavar="NAME", choices=SOURCES, help="source, see below")
    parser.add_argument("--source", type=Path, required=True, help="folder with the official files")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write: .jsonl rows, or for laion400m a .yaml mixture"
    )
    parser.add_argument("--image-folder", type=Path, help="leave out and count rows whose image is not in this folder")
    parser.add_argument("--max-rows", type=int, help="write a random subset of this size, always the same")
    return parser.parse_args()


def valid_rows(
    source: "PublishedSource", folder: Path, image_folder: Path | None, bad: "BadRecords"
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source that training accepts; the others are counted.

    Raises:
        YiVLError: If an official file is missing or has another format.
    """
    from yivl.data.prepare.records import OfficialFolder
    from yivl.data.rows import RowError, parse_row
    from yivl.files.json_files import is_file

    assert source.rows is not None
    try:
        for row in source.rows(OfficialFolder(folder, source.address), bad):
            try:
                image = row.get("image")
                parse_row(row, image or "row without an image")
                if image and image_folder is not None and not is_file(image_folder / image):
                    raise RowError(f"{image_folder / image}: no such image")
            except RowError as error:
                bad.add(source.title, str(error))
            else:
                yield row
    except (KeyError, TypeError, AttributeError) as error:
        raise YiVLError(f"{folder}: not the format of {source.files} at {source.address} ({error!r})") from error


def random_subset(rows: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` rows in their order, or all if there are fewer, without holding more than those."""
    generator = random.Random(0)
    chosen: list[tuple[int, dict[str, Any]]] = []
    for index, row in enumerate(rows):  # reservoir sampling
        if index < count:
            chosen.append((index, row))
        elif (place := generator.randrange(index + 1)) < count:
            chosen[place] = (index, row)
    return [row for _, row in sorted(chosen, key=lambda pair: pair[0])]


def write_rows(rows: Iterable[dict[str, Any]], path: Path, bad: "BadRecords") -> int:
    """Write rows as JSON lines, atomically, and return their number.

    Raises:
        YiVLError: If there is no row; the message names the first of the bad records.
    """
    from tqdm import tqdm

    from yivl.checkpoint.atomic import atomic_file

    number = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        # Unpaired surrogates, as JSON escapes them.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in tqdm(rows, unit="row", disable=not sys.stderr.isatty()):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                number += 1
        if not number:
            raise YiVLError(f"{path}: no valid row to write; bad records: {bad.count:,}, {'; '.join(bad.reasons)}")
    return number


def list_shards(name: str, source: "PublishedSource", folder: Path, path: Path, bad: "BadRecords") -> int:
    """Write the mixture of the complete tar shards, and return the number of their samples."""
    from yivl.checkpoint.atomic import write_text
    from yivl.data.prepare.records import OfficialFolder
    from yivl.data.prepare.shards import complete_shards, mixture_of

    shards = complete_shards(OfficialFolder(folder, source.address), bad)
    if not shards:
        raise YiVLError(f"{folder}: no complete shard; the first: {'; '.join(bad.reasons)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, mixture_of(name, list(shards), path.parent))
    return sum(shards.values())


def main() -> None:
    """Write the rows and report what was left out."""
    arguments = parse_args()
    from yivl.data.prepare.catalog import SOURCES
    from yivl.data.prepare.records import BadRecords

    source, bad = SOURCES[arguments.name], BadRecords()
    suffix = ".yaml" if source.rows is None else ".jsonl"
    if arguments.output.suffix != suffix:
        raise YiVLError(f"--output {arguments.output}: {arguments.name} is written to a {suffix} file")
    if not arguments.source.is_dir():
        raise YiVLError(f"--source {arguments.source}: no such folder; it holds {source.files} of {source.address}")
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise YiVLError(f"--max-rows {arguments.max_rows} is not positive")
    if source.rows is None:
        if arguments.max_rows is not None or arguments.image_folder is not None:
            raise YiVLError(
                f"{arguments.name}: its shards hold images and are streamed; drop --max-rows, --image-folder"
            )
        number = list_shards(arguments.name, source, arguments.source, arguments.output, bad)
    else:
        rows: Iterable[dict[str, Any]] = valid_rows(source, arguments.source, arguments.image_folder, bad)
        if arguments.max_rows is not None:
            rows = random_subset(rows, arguments.max_rows)
        number = write_rows(rows, arguments.output, bad)
    lines = [f"{arguments.output}: {number:,} {'rows' if source.rows else 'samples'} of {source.title}"]
    if bad.count:
        lines.append(f"{bad.count:,} bad records were left out; the first:")
        lines += [f"  {reason}" for reason in bad.reasons]
    print("\n".join(lines))  # noqa: T201 (the result)


if __name__ == "__main__":
    command_line.run(main)
