"""Outcome of an endurance campaign, and the table of docs/reliability.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How often a promise was tried, and how often it held."""

    promise: str
    tried: int
    held: int
    notes: str = ""
