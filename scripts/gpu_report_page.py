"""The GPU report as Markdown: the machine, then one table of all figures with their targets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a figure should reach on one H100 or H200."""

    low: float | None = None
    high: float | None = None

    def text(self, value: float) -> str:
        """Return the target and whether a value reaches it."""
        is_met = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if self.low is None:
            wanted, missed = f"at most {self.high:g}", f"{value / (self.high or 1):.2f} × as much"
        elif self.high is None:
            wanted, missed = f"at least {self.low:g}", f"{value / self.low:.2f} × as much"
        else:
            wanted, missed = f"{self.low:g} to {self.high:g}", f"{value:.2f}"
        return f"{wanted}: met" if is_met else f"{wanted}: **missed**, {missed}"


_ESTIMATE = Target(0.9, 1.1)
TARGETS = {
    ("golden", "float32_without_tf32 error_over_tolerance logits"): Target(high=1),
    ("golden", "float32_without_tf32 equal_answers"): Target(low=1),
    ("small_model", "float32 equal_answers"): Target(low=1),
    ("bf16", "answer first_token times_the_bound"): Target(high=2),
    ("bf16", "answer decode times_the_bound"): Target(high=1.3),
    ("compiled", "answer cuda_graphs"): Target(low=1),
    ("compiled", "answer decode times_the_bound"): Target(high=1.3),
    ("load_34b", "4_bits loads"): Target(low=1),
    ("lora", "mfu"): Target(low=0.4),
    ("full", "mfu"): Target(low=0.45),
    ("full_adafactor", "mfu"): Target(low=0.45),
}
"""By part and name of the figure. A rehearsal has none: its shapes are too small."""
_OF_ALL_PARTS = {"estimate_over_peak": _ESTIMATE}
_HIDDEN = ("prompt_flops", "bytes_per_token", "losses", "title", "useful_flop_per_step", "parameters", "trainable")
"""Figures that only the JSON file has."""
_FAILURES = {"error": "**failed**", "skipped": "skipped", "no_time": "no time left"}
UNITS = {
    "flop_per_s": ("TFLOP/s", 1e12),
    "bytes_per_s": ("GB/s", 1e9),
    "tokens_per_s": ("tokens/s", 1),
    "samples_per_s": ("samples/s", 1),
    "bytes": ("GB", 1e9),
    "seconds": ("s", 1),
    "seconds_per_step": ("s", 1),
}
"""Endings of the names of figures, and the unit they are shown in instead; the first match counts."""


Values = list[tuple[tuple[str, ...], Any]]
"""Figures with their paths in nested objects."""


def markdown_report(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = report["parts"]
    machine = parts.get("environment", {}).get("figures", {}).get("machine", {})
    name = report["machine"]
    about = [describe((key,), value) for key, value in machine.items() if value != name]
    kind = "Rehearsal on a CPU with small shapes, no measurement: " if report["rehearsal"] else ""
    times = f"{report['date']}, {report['seconds'] / 60:.1f} of {report['minutes']:g} minutes"
    lines = [f"{kind}**{name}**, {times}; {', '.join(about)}.", ""]
    lines += ["| part | figure | measured | targets |", "| --- | --- | --- | --- |"]
    for part, entry in parts.items():
        title = entry["title"] + (f", {entry['seconds']:.0f} s" if "seconds" in entry else "")
        for figure, values in _rows(entry["figures"]):
            measured = ", ".join(describe(path, value) for path, value in values)
            targets = "" if report["rehearsal"] else "; ".join(_targets(part, figure, values))
            cells = (title, figure.replace("_", " "), measured, targets)
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
            title = ""
    return "\n".join(lines)


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, Values]]:
    """Yield the rows of a part with their names: one for its own figures, one for each object of figures."""
    if own := list(_flatten({key: value for key, value in figures.items() if not isinstance(value, dict)}, ())):
        yield "", own
    for key, value in figures.items():
        if isinstance(value, dict) and key != "machine":
            yield key, list(_flatten(value, ()))


def _flatten(figures: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        elif key not in _HIDDEN and value not in ([], None):
            yield (*path, key), value


def _targets(part: str, figure: str, values: Values) -> Iterator[str]:
    """Yield the targets of a row, each with whether it is met."""
    for path, value in values:
        name = " ".join(filter(None, (figure, *path)))
        target = TARGETS.get((part, name)) or _OF_ALL_PARTS.get(path[-1])
        if target is not None and isinstance(value, int | float):
            yield f"{' '.join(path).replace('_', ' ')} {target.text(value)}"


def describe(path: tuple[str, ...], value: Any) -> str:
    """Return a figure as text: its name, value and unit."""
    *before, last = path
    if last in _FAILURES:
        return " ".join([*before, f"{_FAILURES[last]}: {value}"])
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int | float) for number in numbers):
        return f"{' '.join(path).replace('_', ' ')} {value}"
    ending = next((ending for ending in UNITS if f"_{last}".endswith(f"_{ending}")), "")
    unit, scale = UNITS.get(ending, ("", 1))
    name = " ".join([*before, last.removesuffix(ending)]).replace("_", " ").strip()
    return f"{name} {' / '.join(f'{number / scale:,.4g}' for number in numbers)} {unit}".strip()
