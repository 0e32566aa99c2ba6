"""The documentation and the code speak the language of the field."""

import re
import subprocess
from pathlib import Path

import pytest
from support.golden import ROOT

# Phrase (a regular expression) and what the field says instead. Source: docs of PyTorch, transformers, DeepSpeed.
DICTIONARY = {
    r"pictures?": "image",
    r"position tables?": "position embeddings",
    r"anew": "again, re-compute",
    r"once more": "again",
    r"(go|goes|going|gone|went) on( from| with)?": "continue, resume",
    r"what trains": "trainable parameters",
    r"learnt": "learned; tokens the loss is computed on",
    r"rows of (a|one|an optimizer) step": "global batch size",
    r"positions of a row": "sequence length",
    r"(keep|float32|fp32) masters": "FP32 master weights",
    r"recomput\w* (the )?layers|layers (that )?(are )?recomput\w*": "gradient checkpointing",
    r"lies behind|behind the layer": "comes after",
    r"(the )?lineage('s)?": "LLaVA baseline",
    r"(layout|names?|functions?|way|scripts?) of the release|the release's": "reference implementation or checkpoint",
    r"to be had": "available",
    r"whole or not( at all)?|there whole": "atomic",
    r"(tell|tells|told|says?|said|speaks?) of": "report, document",
    r"without a word": "silently",
    r"cut on the right": "truncated",
    r"dealt (out )?to": "sharded across ranks",
    r"whoever( waits)?|nobody|anybody|somebody": "queued requests, no user, the caller",
    r"as they come": "streamed",
    r"weight rows|draw rows": "mixture weights, subsample",
    r"place holders?": "placeholder, dummy batch",
    r"strangers?": "user",
    r"mistakes? (of|in what) the user": "user-facing errors",
    r"of one's own|of its own making": "(leave out)",
    r"killed runs?": "interrupted run",
    r"a lack of memory": "out of memory",
    r"for ever": "forever",
    r"fresh start": "initialization",
}
# Questions and answers are data, and so are flags and keys that older runs and scripts use.
DATA = (
    "Describe the picture in detail.",
    "What is in the picture?",
    "--pictures",
    '"pictures"',
    "|picture|",
)
TEXTS = ("yivl/tiny/world/language.py", "yivl/tiny/world/words.py", "tests/test_vocabulary.py")
KINDS = ("*.py", "*.md", "*.sh", "*.sbatch", "*.toml", "*.yml", "*.jinja", "*.txt")


def tracked_files() -> list[Path]:
    """Return the files of code and prose that git tracks, without recorded data."""
    listed = subprocess.run(["git", "ls-files", *KINDS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.splitlines() if not name.startswith("tests/golden/") and name not in TEXTS]
    assert len(files) > 150
    return [ROOT / name for name in files]


@pytest.mark.parametrize("phrase", DICTIONARY)
def test_the_vocabulary_is_that_of_the_field(phrase: str) -> None:
    pattern = re.compile(rf"\b({phrase})\b", re.IGNORECASE)
    found = []
    for path in tracked_files():
        text = path.read_text(encoding="utf-8")
        for data in DATA:
            text = text.replace(data, "")
        for number, line in enumerate(text.splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; write: {DICTIONARY[phrase]}")
    assert not found, "\n".join(found)
