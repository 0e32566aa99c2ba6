"""Functions of the task of lmms-eval that asks the questions as they are."""

from typing import Any


def visuals(record: dict[str, Any]) -> list[Any]:
    """Return the image of a question."""
    return [record["image"].convert("RGB")]


def text(record: dict[str, Any], _: Any = None) -> str:
    """Return a question."""
    return str(record["question"])


def results(record: dict[str, Any], answers: list[str]) -> dict[str, Any]:
    """Return what is recorded of an answer."""
    return {"number": record["number"], "answered": float(bool(answers[0]))}
