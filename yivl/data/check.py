"""Inspect training data before a run: the mixture, the sequence lengths, and every invalid row with the reason.

python -m yivl.data.check DATA [--image-folder FOLDER] [--model-path CHECKPOINT]

Exit code 1 if there are invalid rows.
"""

import argparse
import logging
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl import command_line

if TYPE_CHECKING:
    from yivl.data.encoding import Encoder
    from yivl.data.rows import Row, RowError
    from yivl.data.sources import DataSource

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = command_line.Parser(prog="python -m yivl.data.check", description=__doc__)
    command_line.add_checkpoint_flags(parser)
    about = ".json, .jsonl, .tar shards or a .yaml mixture (docs/data.md)"
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("data", nargs="?", default=argparse.SUPPRESS, help=about)
    data.add_argument("--data", "--data_path", dest="data", help="the same")
    parser.add_argument(
        "--image-folder", default=".", help="base folder of relative image paths (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-outside-images",
        action="store_true",
        help="allow rows to name images outside of the image folder",
    )
    parser.add_argument(
        "--max-length",
        "--model_max_length",
        type=int,
        default=2048,
        help="sequence length, image patches included (default: %(default)s)",
    )
    parser.add_argument("--max-rows-per-source", type=int, help="as in training")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="data-loading workers (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="write the histogram of sequence lengths to this PNG")
    return parser.parse_args()


@dataclass(frozen=True)
class Finding:
    """Properties of a valid row, or why a row is invalid."""

    kind: str = ""
    """``image``, ``text`` or ``caption``."""
    sequence_length: int = 0
    """Before truncation."""
    num_targets: int = 0
    """Tokens the loss is computed on."""
    reason: str = ""
    """Why the row is invalid; begins with its origin."""
    notices: tuple[tuple[str, str], ...] = ()
    """What is unusual about the row, and its origin."""


def inspect_rows(encoder: "Encoder", rows: "Sequence[Row | RowError]") -> list[Finding]:
    """Return the findings of rows, encoded as in training, images included."""
    from yivl.constants import IGNORE_INDEX
    from yivl.data.rows import RowError

    findings = []
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            num_targets = int((encoder(row).labels != IGNORE_INDEX).sum())
            kind = "text" if not row.images else "caption" if not row.turns[0].question else "image"
            length = replace(encoder, max_length=sys.maxsize).sequence_length(row)
            notices = tuple((notice, row.origin) for notice in row.notices)
            findings.append(Finding(kind, length, num_targets, notices=notices))
        except RowError as error:
            findings.append(Finding(reason=str(error)))
    return findings


def inspect_source(source: "DataSource", encoder: "Encoder", workers: int) -> Iterator[Finding]:
    """Yield the finding of every row of a source."""
    from torch.utils.data import DataLoader

    from yivl.data.shards import select_samples
    from yivl.data.sources import load_all_rows
    from yivl.data.streaming import open_shards, read_shards

    if source.is_streamed:
        kept = None
        if source.max_rows is not None:
            subset = select_samples(source, 42)  # the default seed of training
            kept = subset.kept
            _log_limit(source, sum(map(len, kept.values())), subset.num_samples)
        for row in read_shards(open_shards(source.shards() if kept is None else list(kept), kept)):
            yield from inspect_rows(encoder, [row])
        return
    invalid: list[RowError] = []
    found = load_all_rows(source, invalid.append)
    kept_rows = source.subset(found, 42)
    _log_limit(source, len(kept_rows), len(found))
    rows: Any = [*kept_rows, *invalid]
    if rows:  # the workers inspect rows where they usually collate samples
        inspect = partial(inspect_rows, encoder)
        for findings in DataLoader(rows, batch_size=32, num_workers=workers, collate_fn=inspect):
            yield from findings


def _log_limit(source: "DataSource", kept: int, found: int) -> None:
    if kept < found:
        logger.info("%s: max_rows keeps %s of %s rows", source.name, f"{kept:,}", f"{found:,}")


def describe(name: str, findings: Sequence[Finding], max_length: int) -> str:
    """Return the summary of one source."""
    from yivl.data.rows import count_notices

    valid = [finding for finding in findings if not finding.reason]
    counts = ", ".join(
        f"{sum(finding.kind == kind for finding in valid):,} {text}"
        for kind, text in (("image", "with images"), ("caption", "captions"), ("text", "text only"))
    )
    lines = [f"{name}: {len(valid):,} valid rows ({counts}), {len(findings) - len(valid):,} invalid"]
    if valid:
        lengths = sorted(finding.sequence_length for finding in valid)
        truncated = sum(length > max_length for length in lengths)
        lines.append(
            f"  sequence length: {lengths[0]:,} to {lengths[-1]:,}, median {statistics.median(lengths):,.0f}; "
            f"{truncated:,} rows are truncated to {max_length:,}; "
            f"targets: {sum(finding.num_targets for finding in valid):,} tokens"
        )
    lines += [f"  {line}" for line in count_notices(notice for finding in findings for notice in finding.notices)]
    return "\n".join(lines)


def natural_order(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in texts by value: row 2 before row 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def split_outliers(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Return the lengths to draw, sorted, and the number of outliers: of the longest 1%, 4 times the others or more."""
    ordered = sorted(lengths)
    longest = ordered[: -max(1, len(ordered) // 100)][-1:] or ordered
    drawn = [length for length in ordered if length < 4 * longest[0]]
    return drawn, len(ordered) - len(drawn)


def histogram(lengths: Sequence[int]) -> str:
    """Return the sequence lengths as a histogram in text; the last line counts outliers."""
    import numpy as np

    drawn, num_outliers = split_outliers(lengths)
    counts, edges = np.histogram(drawn, bins=20)
    bars = ["█" * max(round(50 * count / max(counts)), int(count > 0)) for count in counts]
    lines = [f"{edge:>9,.0f} {bar} {n:,}" for edge, bar, n in zip(edges[:-1], bars, counts, strict=True) if n]
    if num_outliers:
        lines.append(f"{f'> {drawn[-1]:,}':>9} █ {num_outliers:,} (up to {max(lengths):,})")
    return "\n".join(lines)


def plot_histogram(lengths: Sequence[int], max_length: int, path: Path) -> None:
    """Write the histogram as a PNG; its title counts outliers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="sequence length (text tokens and image patches)", ylabel="rows")
    drawn, num_outliers = split_outliers(lengths)
    axes.hist(drawn, bins=50)
    if num_outliers:
        axes.set_title(f"not shown: {num_outliers:,} rows of up to {max(lengths):,}", fontsize="medium")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if drawn[-1] > max_length:
        axes.axvline(max_length, color="tab:red", label=f"truncated to {max_length:,}")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the report."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from tqdm import tqdm

    from yivl.data.encoding import load_encoder
    from yivl.data.sources import read_sources

    encoder = load_encoder(arguments.model_path, arguments.model_base, max_length=arguments.max_length)
    findings: list[Finding] = []
    reasons: list[str] = []
    sources = read_sources(
        arguments.data,
        arguments.image_folder,
        arguments.max_rows_per_source,
        allow_outside_images=arguments.allow_outside_images,
    )
    for source in sources:
        progress = tqdm(inspect_source(source, encoder, arguments.workers), unit="row", disable=not sys.stderr.isatty())
        of_source = list(progress)
        print(describe(source.name, of_source, arguments.max_length))  # noqa: T201 (the result)
        findings += of_source
        # Rows that cannot be parsed are known before the images are read.
        reasons += sorted((finding.reason for finding in of_source if finding.reason), key=natural_order)
    lengths = [finding.sequence_length for finding in findings if not finding.reason]
    if lengths:
        print(f"\n{histogram(lengths)}")  # noqa: T201
        if arguments.plot is not None:
            plot_histogram(lengths, arguments.max_length, arguments.plot)
    if reasons:
        print("\n  ".join([f"\n{len(reasons):,} invalid rows:", *reasons]))  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
