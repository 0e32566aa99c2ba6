"""Completion in the terminal."""

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from yivl.serve.line_reader import CommandCompleter


def complete(text: str) -> set[str]:
    """Return the lines that Tab can make of a line."""
    found = CommandCompleter().get_completions(Document(text), CompleteEvent(completion_requested=True))
    return {text + one.text for one in found}


def test_tab_completes_paths_after_a_command_that_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "图 1.jpg").touch()
    (tmp_path / "my.json").touch()
    assert complete("/image my") == {"/image my photos/", "/image my.json"}
    assert complete("/image my photos/") == {"/image my photos/图 1.jpg"}
    assert complete('/image "my photos/图') == {'/image "my photos/图 1.jpg'}
    assert complete("/save ~/my.") == {"/save ~/my.json"}
    assert complete(f"/save {tmp_path}/m") == {f"/save {tmp_path}/my photos/", f"/save {tmp_path}/my.json"}
    for text in ("", "my", "/im", "/image", "/system my", "what is in my"):
        assert complete(text) == set()
