"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file takes its place when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write text; half of a character, which JSON can hold and UTF-8 cannot, stays the escape it was."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
