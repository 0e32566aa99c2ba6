"""Rows that cannot be trained on: an error, or left out, written down and counted."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from yivl.data.rows import RowError


@dataclass(frozen=True)
class BadRows:
    """What happens to a bad row.

    Processes and data-loading workers append to one file, a line each, so that nothing is lost with any of them.
    """

    policy: str
    """``error`` or ``skip``."""
    path: Path
    """JSON lines of ``{"reason": ...}``; the reason names file and row."""

    def __call__(self, error: RowError) -> None:
        """Take note of a row that is left out.

        Raises:
            RowError: If the policy is ``error``.
        """
        if self.policy == "error":
            raise RowError(f"{error}; mend the row, or leave such rows out with --on_bad_row skip") from error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"reason": str(error)}, ensure_ascii=False) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode("utf-8"))  # one write, so that lines of several processes do not mix
        finally:
            os.close(handle)

    def report(self) -> str:
        """Return how many different rows were left out and the first reasons; empty if none was."""
        if not self.path.is_file():
            return ""
        reasons = Counter(
            json.loads(line)["reason"] for line in self.path.read_text(encoding="utf-8").splitlines() if line
        )
        examples = "".join(f"\n  {reason}" for reason in list(reasons)[:5])
        return f"{len(reasons)} rows were left out, all listed in {self.path}; the first:{examples}"
