"""Outcome of an endurance campaign, and the table of docs/reliability.md."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How often a promise was tried, and how often it held."""

    promise: str
    tried: int
    held: int
    notes: str = ""


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with a row for each promise."""
    rows = [(outcome.promise, str(outcome.tried), str(outcome.held), outcome.notes) for outcome in outcomes]
    cells = [("promise", "tried", "held", "notes"), ("---", "--:", "--:", "---"), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in cells)
