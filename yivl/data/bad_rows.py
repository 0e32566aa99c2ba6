"""What happens to an invalid row: it is an error, or it is skipped, recorded and counted."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from yivl.data.rows import RowError


@dataclass(frozen=True)
class BadRows:
    """Handler of invalid rows; ranks and data-loading workers append to one file."""

    policy: str
    """``error`` or ``skip``."""
    path: Path
    """JSON lines of ``{"reason": ...}``; the reason names file and row."""

    def __call__(self, error: RowError) -> None:
        """Record an invalid row.

        Raises:
            RowError: If the policy is ``error``.
        """
        if self.policy == "error":
            raise RowError(f"{error}; fix the row, or skip invalid rows with --on_bad_row skip") from error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"reason": str(error)}, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:  # a single write: lines of several processes do not interleave
            file.write(line.encode("utf-8", "backslashreplace"))  # unpaired surrogates, as JSON escapes them

    def report(self) -> str:
        """Return the number of distinct skipped rows and the first five reasons, or an empty string."""
        if not self.path.is_file():
            return ""
        reasons = list(dict.fromkeys(self._reasons()))  # a row counts once
        examples = "".join(f"\n  {reason}" for reason in reasons[:5])
        return f"{len(reasons)} invalid rows were skipped, all listed in {self.path}; the first:{examples}"

    def _reasons(self) -> Iterator[str]:
        # Not splitlines(), which also splits at line separators in a reason.
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):  # the last line before a SIGKILL or a full disk may be cut
                yield json.loads(line)["reason"]
