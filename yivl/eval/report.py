"""What is shown of scores: a table for the terminal, CSV and Markdown, a chart, and the numbers as JSON."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from yivl.checkpoint.atomic import atomic_file, write_json, write_text

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Names in the first columns, numbers in the others; accuracies in percent."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return the table as Markdown with aligned columns, which a terminal shows as well."""
        lines = [[*self.columns], *([_text(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        widths = [max(_width(line[index]) for line in lines) for index in range(len(self.columns))]
        is_number = [all(not isinstance(row[index], str) for row in self.rows) for index in range(len(self.columns))]
        rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, is_number, strict=True)]
        return "\n".join(
            f"| {' | '.join(map(_pad, line, widths, is_number))} |" for line in [lines[0], rule, *lines[1:]]
        )

    def csv(self) -> str:
        """Return the table as CSV, with a heading."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def write_reports(folder: Path, scores: Mapping[str, Any], table: Table) -> None:
    """Write ``scores.json``, ``scores.md`` and ``scores.csv``; each appears whole."""
    write_text(folder / "scores.md", table.markdown() + "\n")
    write_text(folder / "scores.csv", table.csv())
    write_json(folder / "scores.json", scores, sort_keys=False)


def draw_bars(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a PNG with a bar for each group of each series.

    Args:
        path: To be written.
        title: Above the bars.
        groups: In order, from the left.
        series: Accuracies in percent by series and group; what a series lacks has no bar.
    """
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(1.6 * len(groups) + 2, 4.8), layout="constrained")
    axes = figure.add_subplot(title=title, ylabel="accuracy, %", ylim=(0, 100))
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(groups))]
        shown = [(place, values[group]) for place, group in zip(places, groups, strict=True) if group in values]
        bars = axes.bar([place for place, _ in shown], [value for _, value in shown], width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(groups)), [group.replace(" and ", "\nand ") for group in groups])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _text(cell: Cell) -> str:
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def _width(text: str) -> int:
    """Return the columns that a text takes in a terminal, where a Chinese character takes two."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
