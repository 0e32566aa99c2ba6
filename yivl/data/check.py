"""Inspect training data before a run: the mixture, the sequence lengths, and every invalid row with the reason.

python -m yivl.data.check DATA [--image-folder FOLDER] [--model-path CHECKPOINT]

Exit code 1 if there are invalid rows.
"""

import argparse
import logging
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl import command_line

if TYPE_CHECKING:
    import numpy as np

    from yivl.data.encoding import Encoder
    from yivl.data.rows import Row, RowError
    from yivl.data.sources import DataSource

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = command_line.Parser(prog="python -m yivl.data.check", description=__doc__)
    command_line.add_checkpoint_flags(parser)
    about = (
        ".json, .jsonl, .parquet, hub:owner/name, .tar shards, or a mixture: .yaml, .json of InternVL (docs/data.md)"
    )
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
        "--allow-remote-data",
        "--allow_remote_data",
        action="store_true",
        help="allow URLs of tar shards, as in training",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="data-loading workers (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="write the histogram of sequence lengths to this PNG")
    arguments = parser.parse_args()
    if arguments.workers < 0:
        parser.error(f"--workers {arguments.workers} is negative; 0 is none")
    return arguments


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


def inspect_source(source: "DataSource", encoder: "Encoder", workers: int) -> tuple[int | None, Iterator[Finding]]:
    """Return the number of rows of a source, ``None`` for tar shards, and the findings of all rows."""
    from yivl.data.shard_facts import select_samples
    from yivl.data.sources import load_all_rows, select_rows

    if source.is_streamed:
        kept = None
        if source.max_rows is not None:
            subset = select_samples(source, 42)  # the default seed of training
            kept = subset.kept
            _log_limit(source, sum(map(len, kept.values())), subset.num_samples)
        shards = source.shards() if kept is None else list(kept)
        return None, _inspect_in_parallel(shards, partial(_inspect_shard, encoder, kept), None, workers)
    invalid: list[RowError] = []
    found = load_all_rows(source, invalid.append)
    rows = select_rows(source, found, 42)
    _log_limit(source, len(rows), len(found))
    findings = _inspect_in_parallel(rows, partial(inspect_rows, encoder), 32, workers) if rows else iter(())
    return len(rows) + len(invalid), chain(findings, inspect_rows(encoder, invalid))


def _inspect_in_parallel(
    items: Sequence[Any], inspect: Callable[[Any], list[Finding]], batch_size: int | None, workers: int
) -> Iterator[Finding]:
    from torch.utils.data import DataLoader

    # The workers inspect rows where they usually collate samples.
    loader: Any = DataLoader(items, batch_size=batch_size, num_workers=min(workers, len(items)), collate_fn=inspect)  # type: ignore[arg-type]
    return chain.from_iterable(loader)


def _inspect_shard(encoder: "Encoder", kept: Mapping[str, Sequence[int]] | None, path: str) -> list[Finding]:
    from yivl.data.streaming import open_shards, read_shards

    return [finding for row in read_shards(open_shards([path], kept)) for finding in inspect_rows(encoder, [row])]


def _log_limit(source: "DataSource", kept: int, found: int) -> None:
    if kept < found:
        logger.info("%s: max_rows keeps %s of %s rows", source.name, f"{kept:,}", f"{found:,}")


class Summary:
    """Counts over the findings of rows, in a few bytes for each valid row."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.lengths = array("q")
        """Sequence lengths of the valid rows."""
        self.num_targets = 0
        self.reasons: list[str] = []
        """Of the invalid rows."""
        self.notices: dict[str, tuple[int, list[str]]] = {}
        """Number of rows of every notice, and the origins of the first five."""

    def add(self, finding: Finding) -> None:
        """Count one row."""
        if finding.reason:
            self.reasons.append(finding.reason)
            return
        self.kinds[finding.kind] += 1
        self.lengths.append(finding.sequence_length)
        self.num_targets += finding.num_targets
        for notice, origin in finding.notices:
            count, first = self.notices.get(notice, (0, []))
            self.notices[notice] = count + 1, first if len(first) == 5 else [*first, origin]

    def describe(self, name: str, max_length: int) -> str:
        """Return the summary of one source."""
        import numpy as np

        from yivl.data.rows import summarize_notice

        counts = ", ".join(
            f"{self.kinds[kind]:,} {text}"
            for kind, text in (("image", "with images"), ("caption", "captions"), ("text", "text only"))
        )
        lines = [f"{name}: {len(self.lengths):,} valid rows ({counts}), {len(self.reasons):,} invalid"]
        if self.lengths:
            lengths = np.array(self.lengths)
            lines.append(
                f"  sequence length: {lengths.min():,} to {lengths.max():,}, median {np.median(lengths):,.0f}; "
                f"{(lengths > max_length).sum():,} rows are truncated to {max_length:,}; "
                f"targets: {self.num_targets:,} tokens"
            )
        lines += [f"  {summarize_notice(notice, *found)}" for notice, found in self.notices.items()]
        return "\n".join(lines)


def natural_order(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in texts by value: row 2 before row 10."""
    parts = ((part, part.lstrip("0")) for part in re.split(r"(\d+)", text))
    # By length, then digits: int() refuses thousands of them.
    return [(len(digits), digits) if part.isdecimal() else (0, part) for part, digits in parts]


def split_outliers(lengths: Sequence[int]) -> "tuple[np.ndarray, int]":
    """Return the lengths to draw, sorted, and the number of outliers: of the longest 1%, 4 times the others or more."""
    import numpy as np

    ordered = np.sort(np.asarray(lengths))
    longest = ordered[: -max(1, len(ordered) // 100)][-1:]
    drawn = ordered[ordered < 4 * (longest if len(longest) else ordered)[0]]
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
    lengths = array("q")
    reasons: list[str] = []
    sources = read_sources(
        arguments.data,
        arguments.image_folder,
        arguments.max_rows_per_source,
        allow_outside_images=arguments.allow_outside_images,
        allow_remote_data=arguments.allow_remote_data,
    )
    for source in sources:
        summary = Summary()
        total, findings = inspect_source(source, encoder, arguments.workers)
        for finding in tqdm(findings, total=total, unit="row", disable=not sys.stderr.isatty()):
            summary.add(finding)
        print(summary.describe(source.name, arguments.max_length))  # noqa: T201 (the result)
        lengths += summary.lengths
        # Rows that cannot be parsed are known before the images are read.
        reasons += sorted(summary.reasons, key=natural_order)
    if lengths:
        print(f"\n{histogram(lengths)}")  # noqa: T201
        if arguments.plot is not None:
            plot_histogram(lengths, arguments.max_length, arguments.plot)
    if reasons:
        print("\n  ".join([f"\n{len(reasons):,} invalid rows:", *reasons]))  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
