"""Gates and the report of the small model, from the score files of ``yivl.eval``.

python -m yivl.tiny.recipe.report gate   --scores out/tiny/scores/stage1
python -m yivl.tiny.recipe.report report --output_dir out/tiny
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from yivl import command_line
from yivl.errors import YiVLError
from yivl.train.run_log import draw_losses

TARGETS: Final = {
    "presence": 95,
    "count": 95,
    "kind": 90,
    "activity": 90,
    "colour": 90,
    "place": 85,
    "sign": 80,
}
"""Exact answers on new scenes, in percent; the other kinds of questions have no target."""
# Folders of scores beside that of the trained model on new scenes, and what each is called.
SPLITS: Final = {"scenes": "new scenes", "combinations": "new combinations", "sizes": "new sizes"}
CONTROLS: Final = {"scenes": "own picture", "another": "another's picture", "none": "no picture"}
STAGES: Final = {"stage1": "stage 1, 96 pixels", "stage2": "stage 2, 192 pixels", "stage2-alone": "stage 2 without 1"}

LOGS: Final = {
    "language_model.training": "language model",
    "clip.training": "CLIP",
    "naming.training": "patch naming",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3",
}


def read_scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the scores of a folder by kind of question and language.

    Raises:
        YiVLError: If there are none.
    """
    try:
        report = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        return {tuple(score["group"]): score for score in report["scores"]}
    except (OSError, ValueError, KeyError) as error:
        raise YiVLError(f"{folder}: no scores of python -m yivl.eval ({error})") from error


def gate(folder: Path) -> str:
    """Return a table of one set of scores beside their targets."""
    scores = read_scores(folder)
    lines = ["| question | en % | zh % | best constant % | target % |", "|---|---|---|---|---|"]
    for kind in _kinds(scores):
        en, zh = scores[kind, "en"], scores[kind, "zh"]
        constant = max(en["constant"], zh["constant"])
        lines.append(
            f"| {kind} | {en['accuracy']:.1f} | {zh['accuracy']:.1f} | {constant:.1f} | {TARGETS.get(kind, '')} |"
        )
    return "\n".join(lines)


def compare(folder: Path, names: dict[str, str]) -> str:
    """Return a table of several sets of scores, both languages together; those that are missing are left out."""
    present = {name: title for name, title in names.items() if (folder / name / "scores.json").is_file()}
    columns = {title: read_scores(folder / name) for name, title in present.items()}
    lines = [f"| question | {' | '.join(f'{title} %' for title in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in _kinds(next(iter(columns.values()))):
        means = [(scores[kind, "en"]["accuracy"] + scores[kind, "zh"]["accuracy"]) / 2 for scores in columns.values()]
        lines.append(f"| {kind} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def report(folder: Path) -> str:
    """Return the report of a finished run as Markdown."""
    scores = folder / "scores"
    sections = ["# The small Yi-VL, measured", _phases(folder)]
    number = next(iter(read_scores(scores / "scenes").values()))["number"]
    sections += [
        f"## New scenes\n\nExact greedy answers; {number} questions of each kind in each language, each asked alone.",
        gate(scores / "scenes"),
        "## What it was never trained on\n\nBoth languages together, as in all tables below.",
        compare(scores, SPLITS),
        "## Does it look?",
        compare(scores, CONTROLS),
        "## What the stages bring\n\nCaptions alone, questions not seen since the language model was trained.",
        compare(scores, STAGES),
        _minutes(folder),
    ]
    return "\n\n".join(sections) + "\n"


def _minutes(folder: Path) -> str:
    """Return how long each step of the script took; one that was stopped counts from where it went on."""
    lines = ["## Minutes", "", "| written | minutes |", "|---|---|"]
    for line in (folder / "seconds.tsv").read_text(encoding="utf-8").splitlines():
        name, seconds = line.split("\t")
        lines.append(f"| {name} | {int(seconds) / 60:.1f} |")
    return "\n".join(lines)


def _phases(folder: Path) -> str:
    lines = ["## Gates of the phases before stage 1", "", "| held-out score | reached % | target % |", "|---|---|---|"]
    for phase in ("language_model", "clip", "naming"):
        for score in json.loads((folder / f"{phase}.training" / "gate.json").read_text()):
            lines.append(f"| {score['name']} | {score['reached']:.1f} | {score['target'] or ''} |")
    return "\n".join(lines)


def _kinds(scores: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(kind for kind, _ in scores))


def main() -> None:
    """Print a gate, or write ``report.md`` and ``losses.png`` and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gate").add_argument("--scores", required=True, help="folder of scores.json")
    commands.add_parser("report").add_argument("--output_dir", required=True, help="folder of scripts/train_tiny.sh")
    arguments = parser.parse_args()
    if arguments.command == "gate":
        print(gate(Path(arguments.scores)))  # noqa: T201 (the result)
        return
    folder = Path(arguments.output_dir)
    text = report(folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw_losses({title: folder / name / "log.jsonl" for name, title in LOGS.items()}, folder / "losses.png")
    print(text)  # noqa: T201 (the result)


if __name__ == "__main__":
    command_line.run(main)
