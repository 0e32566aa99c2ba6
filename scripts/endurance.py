"""Try what docs/reliability.md promises: interrupted training, requests to the API, hostile files.

python scripts/endurance.py kills           runs and conversions are killed at random moments, and started again
python scripts/endurance.py requests        valid, wrong and abandoned requests to the API and the page
python scripts/endurance.py hostile         damaged and hostile files of every format that is read
python scripts/endurance.py all --short     all of them, in their short form

The table goes to stdout. Exit code 1 if a promise did not hold, or was never tried, unless --short is given.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from benchmark_report import replace_section
from endurance_report import Outcome, outcome_table

from yivl import command_line
from yivl.parser import Parser

CAMPAIGNS = ("kills", "requests", "hostile")
MINUTES = {False: 20.0, True: 1.5}
"""Default ``--minutes``, by ``--short``."""


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("campaign", choices=(*CAMPAIGNS, "all"), help="what to try")
    parser.add_argument("--short", action="store_true", help="a small part of each campaign, as in the tests")
    parser.add_argument("--minutes", type=float, help="time limit of each campaign; 20 by default, 1.5 with --short")
    parser.add_argument("--output", type=Path, help="folder for the outcomes as JSON, and figures")
    about = "replace the table of each campaign in a page with its section, and the figure of the memory beside it"
    parser.add_argument("--markdown", type=Path, help=about)
    return parser.parse_args()


def main() -> None:
    """Run the campaigns and print their table."""
    arguments = parse_args()
    minutes = MINUTES[arguments.short] if arguments.minutes is None else arguments.minutes
    outcomes: list[Outcome] = []
    for name in CAMPAIGNS if arguments.campaign == "all" else (arguments.campaign,):
        started = time.monotonic()
        campaign = importlib.import_module(f"endurance_{name}")  # heavy imports, for what is run only
        options = {}
        if name == "requests" and arguments.markdown is not None:
            options["figure"] = arguments.markdown.parent / "endurance-memory.png"  # as docs/serving.md shows it
        found: list[Outcome] = campaign.run(60 * minutes, arguments.short, **options)
        outcomes += found
        seconds = time.monotonic() - started
        text = f"{describe_machine()}, {seconds / 60:.0f} minutes.\n\n{outcome_table(found)}"
        print(text, flush=True)
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            report = {"seconds": round(seconds), "outcomes": [asdict(outcome) for outcome in found]}
            lines = json.dumps(report, indent=2, ensure_ascii=False)
            (arguments.output / f"{name}.json").write_text(lines + "\n", encoding="utf-8")
        if arguments.markdown is not None:
            replace_section(arguments.markdown, name, text)
    # A short campaign may end before a promise is tried.
    if any(outcome.held < outcome.tried or not (outcome.tried or arguments.short) for outcome in outcomes):
        sys.exit(1)


def describe_machine() -> str:
    """Return the CPU, the number of cores, and the versions that matter."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    command_line.run(main)
