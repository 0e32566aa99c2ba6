"""Parts of the GPU report: their flags, and the figures that a part prints while it runs.

Every line of output that is a JSON object has all figures of a part so far, so that a part that is stopped loses only
the figure it was measuring.
"""

import gc
import importlib.util
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from yivl import command_line
from yivl.parser import Parser


class SkippedError(Exception):
    """A figure that this machine cannot measure, because a package is missing for example."""


@dataclass
class Figures:
    """The figures of one part, printed whenever one is added."""

    part: str
    device: str
    rehearsal: bool
    seconds: float
    """Time limit of the part."""
    values: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Time until the part is stopped."""
        return self.start + self.seconds - time.monotonic()

    def add(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure a figure; if it fails, its error takes its place and the part continues."""
        free_memory()  # the peak of memory is that of this figure
        try:
            value = measure()
        except SkippedError as error:
            value = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            value = {"error": one_line(error)}
        self.values[name] = value
        self.show()
        free_memory()

    def show(self) -> None:
        """Print the figures so far."""
        from benchmark_inference import rounded

        print(json.dumps({"part": self.part} | rounded(self.values)), flush=True)


@dataclass(frozen=True)
class Part:
    """One part of the report, which a process measures."""

    name: str
    seconds: float
    """Expected on one H100, imports included; not measured yet."""
    title: str
    measure: Callable[[Figures], None]


def run_part(parts: Sequence[Part], description: str | None) -> None:
    """Parse the flags of a script with parts, and print what they ask for."""
    parser = Parser(description=description)
    parser.add_argument("--list", action="store_true", help="print the parts as JSON lines, and stop")
    names = [part.name for part in parts]
    parser.add_argument("--part", choices=[*names, "all"], help="part to measure; all in the rehearsal")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rehearsal", action="store_true", help="small shapes, each figure once")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of the part (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.list and arguments.part is None:
        parser.error("the following arguments are required: --part or --list")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    command_line.set_log_level(logging.INFO)
    for part in parts:
        if arguments.list:
            print(json.dumps({"part": part.name, "seconds": part.seconds, "title": part.title}))
        elif arguments.part in (part.name, "all"):
            measure_part(part, Figures(part.name, arguments.device, arguments.rehearsal, arguments.seconds))


def measure_part(part: Part, figures: Figures) -> None:
    """Measure a part and print its figures; if it fails, its error is one of them."""
    try:
        part.measure(figures)
    except SkippedError as error:
        figures.values["skipped"] = str(error)
    except Exception as error:
        traceback.print_exc()
        figures.values["error"] = one_line(error)
    figures.show()
    free_memory()


def require_packages(*names: str) -> None:
    """Check that packages are installed.

    Raises:
        SkippedError: If one is not; names it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SkippedError(f"needs {name}, which is not installed")


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return f"{name}: {lines[0][:300]}" if lines else name


def free_memory() -> None:
    """Return memory that nothing uses to the GPU, and reset its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # PyTorch 2.11, after a capture that could not be ended
            print(f"memory is not returned: {one_line(error)}", file=sys.stderr)
        torch.cuda.reset_peak_memory_stats()
