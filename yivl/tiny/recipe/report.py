"""Tables of scores with their targets, and the report of a run, from the score files of ``yivl.eval``.

python -m yivl.tiny.recipe.report gate   --scores out/tiny/scores/stage1
python -m yivl.tiny.recipe.report report --output_dir out/tiny
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from yivl import command_line
from yivl.errors import YiVLError

TARGETS: Final = {"presence": 95, "count": 95, "kind": 90, "activity": 90, "colour": 90, "place": 85, "sign": 80}
"""Exact-match accuracy on new scenes, in percent; other kinds of questions have no target. Source: ours."""
# Folders of scores, and the titles of their columns.
SPLITS: Final = {"scenes": "new scenes", "combinations": "new combinations", "sizes": "new sizes"}
CONTROLS: Final = {"scenes": "own image", "another": "another image", "none": "no image"}
STAGES: Final = {"stage1": "stage 1, 96 pixels", "stage2": "stage 2, 192 pixels", "stage2-alone": "stage 2 without 1"}
PHASES: Final = {
    "language_model.training": "language model",
    "clip.training": "CLIP",
    "naming.training": "patch naming",
}

Scores = Mapping[tuple[str, str], Mapping[str, Any]]


def read_scores(folder: Path) -> Scores:
    """Return the scores of a folder by kind of question and language.

    Raises:
        YiVLError: If the folder holds no scores.
    """
    try:
        report = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        return {tuple(score["group"]): score for score in report["scores"]}
    except (OSError, ValueError, KeyError) as error:
        raise YiVLError(f"{folder}: no scores of python -m yivl.eval ({error})") from error


def gate(folder: Path) -> str:
    """Return a table of one set of scores with their targets."""
    scores = read_scores(folder)
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in scores):
        en, zh = scores[kind, "en"], scores[kind, "zh"]
        numbers = (en["accuracy"], zh["accuracy"], max(en["constant"], zh["constant"]))
        rows.append([kind, *(f"{number:.1f}" for number in numbers), TARGETS.get(kind, "")])
    return _table(["question", "en %", "zh %", "best constant %", "target %"], rows)


def compare(folder: Path, titles: Mapping[str, str]) -> str:
    """Return a table with a column for each set of scores that exists, as the mean of both languages."""
    present = [name for name in titles if (folder / name / "scores.json").is_file()]
    columns = [read_scores(folder / name) for name in present]
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in columns[0]):
        means = [(scores[kind, "en"]["accuracy"] + scores[kind, "zh"]["accuracy"]) / 2 for scores in columns]
        rows.append([kind, *(f"{mean:.1f}" for mean in means)])
    return _table(["question", *(f"{titles[name]} %" for name in present)], rows)


def report(folder: Path) -> str:
    """Return the report of a finished run as Markdown."""
    scores = folder / "scores"
    number = next(iter(read_scores(scores / "scenes").values()))["number"]
    held_out = [
        [score["name"], f"{score['reached']:.1f}", score["target"] or ""]
        for phase in PHASES
        for score in json.loads((folder / phase / "gate.json").read_text())
    ]
    times = [line.split("\t") for line in (folder / "seconds.tsv").read_text(encoding="utf-8").splitlines()]
    sections = [
        "# Evaluation of the small Yi-VL",
        "## Phases before stage 1",
        _table(["held-out score", "reached %", "target %"], held_out),
        f"## New scenes\n\nExact match, greedy decoding, {number} questions of each kind in each language.",
        gate(scores / "scenes"),
        "## Held-out splits\n\nMean of both languages, as in all tables below.",
        compare(scores, SPLITS),
        "## Controls",
        compare(scores, CONTROLS),
        "## Effect of the stages\n\nThe stages train on captions only.",
        compare(scores, STAGES),
        "## Time",
        _table(["output", "minutes"], [(name, f"{int(seconds) / 60:.1f}") for name, seconds in times]),
    ]
    return "\n\n".join(sections) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def main() -> None:
    """Print a table of scores, or write ``report.md`` and ``losses.png`` and print the report."""
    parser = command_line.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gate").add_argument("--scores", type=Path, required=True, help="folder of scores.json")
    commands.add_parser("report").add_argument("--output_dir", type=Path, required=True, help="output of train_tiny.sh")
    arguments = parser.parse_args()
    if arguments.command == "gate":
        print(gate(arguments.scores))  # noqa: T201 (the result)
        return
    from yivl.train.run_log import draw_losses

    folder = arguments.output_dir
    text = report(folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    outputs = PHASES | {f"stage{stage}": f"stage {stage}" for stage in (1, 2, 3)}
    draw_losses({title: folder / name / "log.jsonl" for name, title in outputs.items()}, folder / "losses.png")
    print(text)  # noqa: T201 (the result)


if __name__ == "__main__":
    command_line.run(main)
