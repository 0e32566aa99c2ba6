"""Scores as a table (terminal, Markdown, CSV), as JSON and as a bar chart."""

import csv
import io
import re
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
        """Return the table as aligned Markdown; a Chinese character takes two columns of a terminal."""
        texts = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]
        lines = [[*self.columns], *([text.replace("|", "\\|") for text in row] for row in texts)]
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        is_number = [all(not isinstance(cell, str) for cell in column) for column in zip(*self.rows, strict=True)]
        rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, is_number, strict=True)]
        return "\n".join(
            f"| {' | '.join(map(_pad, line, widths, is_number))} |" for line in [lines[0], rule, *lines[1:]]
        )

    def csv(self) -> str:
        """Return the table as CSV with a header."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Chart:
    """A bar for each group of each series, and beside them one for each model and split."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Mapping[str, float]]
    """Accuracies in percent by series and group; a missing group has no bar."""
    models: Mapping[str, Mapping[str, float]]
    """Accuracies in percent on the whole benchmark, by model and split; none without a comparison."""

    def draw(self, path: Path) -> None:
        """Write the chart as a PNG."""
        from matplotlib.figure import Figure  # slow to import, and only this needs it

        widths = [1.4 * len(self.groups) + 2, *([6] if self.models else [])]
        figure = Figure(figsize=(sum(widths), 5.2), layout="constrained")
        axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        self._draw_groups(axes[0])
        if self.models:
            self._draw_models(axes[1])
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=120, format="png")

    def _draw_groups(self, axes: Any) -> None:
        axes.set(title=self.title, ylabel="accuracy, %", ylim=(0, 100))
        width = 0.8 / len(self.series)
        for number, (name, values) in enumerate(self.series.items()):
            offset = (number - (len(self.series) - 1) / 2) * width
            shown = [(index + offset, values[group]) for index, group in enumerate(self.groups) if group in values]
            bars = axes.bar([position for position, _ in shown], [value for _, value in shown], width, label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set_xticks(range(len(self.groups)), [re.sub(r" (and|&) ", r"\n\1 ", group) for group in self.groups])
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)

    def _draw_models(self, axes: Any) -> None:
        """Draw a horizontal bar for each model and split, the best model on top."""
        splits = list(dict.fromkeys(split for values in self.models.values() for split in values))
        models = sorted(self.models, key=lambda model: max(self.models[model].values()))
        height = 0.8 / len(splits)
        for number, split in enumerate(splits):
            offset = ((len(splits) - 1) / 2 - number) * height
            shown = [
                (i + offset, self.models[name][split]) for i, name in enumerate(models) if split in self.models[name]
            ]
            bars = axes.barh(
                [position for position, _ in shown],
                [value for _, value in shown],
                height,
                label=split,
                alpha=1 - number / 2,
            )
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set(title="all domains, beside published accuracies of January 2024", xlabel="accuracy, %", xlim=(0, 100))
        axes.set_yticks(range(len(models)), models)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == "this model" else "normal")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")


@dataclass(frozen=True)
class Report:
    """Results of a benchmark."""

    files: Mapping[str, Any]
    """Contents of files by name: values of JSON files, text of others; the last one holds the predictions."""
    scores: Mapping[str, Any]
    """Of ``scores.json``."""
    table: Table | None
    """``None`` if the answers are not published, so that there are no scores."""
    chart: Chart | None = None

    def write(self, folder: Path, about: Mapping[str, Any]) -> str:
        """Write all files into a folder, with ``about`` in ``scores.json``, and return the text to print."""
        for name, content in self.files.items():
            if name.endswith(".json"):
                write_json(folder / name, content, sort_keys=False)
            else:
                write_text(folder / name, content)
        if self.table is None:
            path = folder / [*self.files][-1]
            return f"{path}: {self.scores['questions']} predictions to submit; the answers are not published"
        write_text(folder / "scores.md", self.table.markdown() + "\n")
        write_text(folder / "scores.csv", self.table.csv())
        write_json(folder / "scores.json", {**about, **self.scores}, sort_keys=False)
        if self.chart is not None:
            self.chart.draw(folder / "scores.png")
        return self.table.markdown()


def _width(text: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
