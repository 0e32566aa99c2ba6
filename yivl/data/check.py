"""Look at training data before a run: the mix, the lengths, and every row that would be left out, with the reason.

python -m yivl.data.check DATA --model-path CHECKPOINT [--image-folder FOLDER]

Exit code 1 if there are bad rows.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl import command_line

if TYPE_CHECKING:
    from yivl.data.encoding import Encoder
    from yivl.data.rows import Row, RowError
    from yivl.data.sources import Source

_BINS = 20


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m yivl.data.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help=".json, .jsonl, .tar shards or a .yaml mixture (docs/data.md)")
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--image-folder", default=".", help="where relative picture paths start (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, help="positions of a row (default: %(default)s)")
    parser.add_argument("--max-rows-per-source", type=int, help="as in training")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="write the histogram of lengths to this PNG")
    return parser.parse_args()


@dataclass(frozen=True)
class Finding:
    """What the check found out about one row."""

    kind: str
    """``picture``, ``text`` or ``caption``."""
    positions: int
    """Length before a cut."""
    targets: int
    reason: str
    """Why the row is bad; empty if it is not."""


def inspect_row(row: "Row | RowError", encoder: "Encoder") -> Finding:
    """Encode a row as training would, its pictures included."""
    from yivl.constants import IGNORE_INDEX
    from yivl.data.rows import RowError

    if isinstance(row, RowError):
        return Finding("", 0, 0, str(row))
    kind = "text" if not row.images else "caption" if not row.turns[0].question else "picture"
    positions = replace(encoder, max_length=sys.maxsize).num_positions(row)
    try:
        targets = int((encoder(row).labels != IGNORE_INDEX).sum())
    except RowError as error:
        return Finding(kind, positions, 0, str(error))
    return Finding(kind, positions, targets, "")


def inspect_source(source: "Source", encoder: "Encoder", workers: int) -> Iterator[Finding]:
    """Yield a finding for every row of a source."""
    from torch.utils.data import DataLoader

    from yivl.data.rows import RowError
    from yivl.data.sources import load_rows
    from yivl.data.streaming import open_shards, read_shards

    if source.is_stream:
        for row in read_shards(open_shards(source.shards())):
            yield inspect_row(row, encoder)
        return
    bad: list[RowError] = []
    rows: list[Row | RowError] = [*load_rows(source, 42, bad.append), *bad]
    if not rows:
        return
    dataset: Any = _Inspection(rows, encoder)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=32, num_workers=workers, collate_fn=list)
    for findings in loader:
        yield from findings


@dataclass(frozen=True)
class _Inspection:
    """Rows as a data set of findings, so that workers can share them."""

    rows: "Sequence[Row | RowError]"
    encoder: "Encoder"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Finding:
        return inspect_row(self.rows[index], self.encoder)


def describe(name: str, findings: Sequence[Finding], max_length: int) -> str:
    """Return what is to be said of the rows of one source."""
    good = [finding for finding in findings if not finding.reason]
    counts = ", ".join(
        f"{sum(finding.kind == kind for finding in good):,} {text}"
        for kind, text in (("picture", "with pictures"), ("caption", "captions"), ("text", "text alone"))
    )
    lines = [f"{name}: {len(good):,} good rows ({counts}), {len(findings) - len(good):,} bad"]
    if good:
        lengths = sorted(finding.positions for finding in good)
        cut = sum(length > max_length for length in lengths)
        lines.append(
            f"  positions: {lengths[0]:,} to {lengths[-1]:,}, median {statistics.median(lengths):,.0f}; "
            f"{cut:,} rows are cut at {max_length:,}; targets: {sum(finding.targets for finding in good):,}"
        )
    return "\n".join(lines)


def histogram(lengths: Sequence[int]) -> str:
    """Return the lengths as bars of text."""
    width = max(max(lengths) // _BINS + 1, 1)
    counts = [0] * (max(lengths) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    scale = 50 / max(counts)
    return "\n".join(
        f"{index * width:>7,} {'█' * max(round(count * scale), int(count > 0))} {count:,}"
        for index, count in enumerate(counts)
        if count or index * width >= min(lengths)
    )


def draw_histogram(lengths: Sequence[int], max_length: int, picture: Path) -> None:
    """Write the histogram as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="positions of a row (text tokens and patches)", ylabel="rows")
    axes.hist(lengths, bins=50)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if max(lengths) > max_length:
        axes.axvline(max_length, color="tab:red", label=f"cut at {max_length:,}")
        axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Print the report."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from tqdm import tqdm

    from yivl.checkpoint.loading import read_small_files, resolve_checkpoint
    from yivl.data.encoding import Encoder
    from yivl.data.sources import read_sources

    config, tokenizer, image_processor = read_small_files(resolve_checkpoint(arguments.model_path))
    encoder = Encoder(tokenizer, image_processor, config.num_patches, arguments.max_length)
    findings: list[Finding] = []
    for source in read_sources(arguments.data, arguments.image_folder, arguments.max_rows_per_source):
        progress = tqdm(inspect_source(source, encoder, arguments.workers), unit="row", disable=not sys.stderr.isatty())
        of_source = list(progress)
        print(describe(source.data_path, of_source, arguments.max_length))  # noqa: T201 (the result)
        findings += of_source
    lengths = [finding.positions for finding in findings if not finding.reason]
    if lengths:
        print(f"\n{histogram(lengths)}")  # noqa: T201
        if arguments.plot is not None:
            draw_histogram(lengths, arguments.max_length, arguments.plot)
    reasons = [finding.reason for finding in findings if finding.reason]
    if reasons:
        print(f"\n{len(reasons):,} rows would be left out:")  # noqa: T201
        print("\n".join(f"  {reason}" for reason in reasons))  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
