"""Measure the answers of a model.

python -m yivl.eval rows  --data rows.json --image-folder images --group-by kind language --output out/rows
python -m yivl.eval mmmu  --model-path 01-ai/Yi-VL-6B --data MMMU/MMMU --output out/mmmu
python -m yivl.eval cmmmu --model-path 01-ai/Yi-VL-6B --data m-a-p/CMMMU --output out/cmmmu

Every question is asked alone, greedily. The output folder keeps each answer as it comes: the same command goes on where
a killed one was. Under python -m yivl.train.launch the questions are shared among processes. A table is printed, and
written beside the answers as Markdown, CSV and JSON; benchmarks have a chart and a file for submission too.
"""

import argparse
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yivl import command_line

if TYPE_CHECKING:
    from yivl.eval.benchmarks.questions import Question

logger = logging.getLogger(__name__)

WHOLE: Final = 900
"""Questions of the validation splits of both benchmarks. Source: their READMEs."""

# Flags that change no answer, at most its last bits: a run may go on with others.
_FREE: Final = ("output", "batch_size", "device", "attn_implementation", "group_by")


def parse_args() -> argparse.Namespace:
    """Return the benchmark and its flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="{rows,mmmu,cmmmu}")

    def add(name: str, about: str, data: str | None, data_about: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command_line.add_model_flags(command, must_name_model=name != "rows")
        default = f" (default: {data})" if data else ""
        command.add_argument("--data", default=data, required=data is None, help=data_about + default)
        command.add_argument("--output", required=True, help="folder to write")
        command.add_argument("--batch-size", type=int, default=16, help="asked together (default: %(default)s)")
        return command

    rows = add("rows", "compare answers with those of rows", None, "rows in the published form, .json or .jsonl")
    rows.add_argument("--image-folder", default=".", help="where relative picture paths start (default: %(default)s)")
    rows.add_argument("--group-by", nargs="*", default=[], help="fields of the rows that have scores of their own")
    rows.add_argument(
        "--pictures", choices=("own", "another", "none"), default="own", help="shown with each question; a control"
    )
    rows.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer (default: %(default)s)")

    where = "folder of parquet files or of save_to_disk, or hub id"
    mmmu = add("mmmu", "MMMU: 30 subjects in English", "MMMU/MMMU", where)
    mmmu.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: %(default)s)")
    mmmu.add_argument(
        "--protocol",
        choices=("yi", "official"),
        default="yi",
        help="prompts, pictures and length of the authors of Yi-VL, or of MMMU's own example (default: %(default)s)",
    )
    cmmmu = add("cmmmu", "CMMMU: 30 subjects in Chinese", "m-a-p/CMMMU", where)
    cmmmu.add_argument("--split", choices=("val", "test"), default="val", help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Ask, compare, report."""
    arguments = parse_args()
    command_line.log_to_stderr()  # before the imports, which have things to say

    from yivl.errors import YiVLError

    if arguments.batch_size < 1:
        raise YiVLError("--batch-size is at least 1")
    run_rows(arguments) if arguments.benchmark == "rows" else run_benchmark(arguments)


def run_rows(arguments: argparse.Namespace) -> None:
    """Compare answers with those of rows."""
    from yivl.eval.benchmarks import rows
    from yivl.eval.report import write_reports

    data, images = Path(arguments.data).expanduser(), Path(arguments.image_folder).expanduser()
    with said_once():
        items = rows.read_items(data, images, arguments.group_by)
    folder = Path(arguments.output).expanduser()
    asked = rows.questions(items, arguments.pictures)
    responses = ask(arguments, asked, folder, arguments.max_new_tokens)
    if responses is None:
        return
    answers = list(responses.values())
    scores = rows.score(items, answers)
    table = rows.table(scores, arguments.group_by)
    about = {name: getattr(arguments, name) for name in ("benchmark", "data", "pictures", "group_by")}
    about |= {"model": arguments.model_path, "scores": [dataclasses.asdict(one) for one in scores]}
    rows.write_answers(folder, items, answers)
    write_reports(folder, about, table)
    print(table.markdown())  # noqa: T201 (the result)


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Ask the questions of MMMU or CMMMU, and score the responses where the split has its answers."""
    from yivl.checkpoint.atomic import write_json, write_text
    from yivl.eval.benchmarks import cmmmu, mmmu

    with said_once():
        if arguments.benchmark == "mmmu":
            questions = mmmu.read_questions(arguments.data, arguments.split, arguments.protocol)
            max_new_tokens = mmmu.MAX_NEW_TOKENS[arguments.protocol]
        else:
            questions = cmmmu.read_questions(arguments.data, arguments.split)
            max_new_tokens = cmmmu.MAX_NEW_TOKENS
    folder = Path(arguments.output).expanduser()
    responses = ask(arguments, questions, folder, max_new_tokens)
    if responses is None:
        return
    benchmark = mmmu if arguments.benchmark == "mmmu" else cmmmu
    write_json(folder / "responses.json", responses, sort_keys=False)
    name, text = benchmark.submission(questions, responses)
    write_text(folder / name, text)
    if arguments.split == "test":
        print(f"{folder / name}: {len(responses)} predictions to submit; the answers are not published")  # noqa: T201
        return
    scores = benchmark.score_rows([{**question.fields, "response": responses[question.id]} for question in questions])
    report(
        arguments,
        folder,
        scores,
        Counter(benchmark.place(question.fields) for question in questions),
        benchmark.PUBLISHED,
    )


@contextmanager
def said_once() -> Iterator[None]:
    """Let a mistake that all processes find be said by the first."""
    from yivl.errors import YiVLError

    try:
        yield
    except YiVLError:
        if os.environ.get("RANK", "0") != "0":
            from yivl.eval.runner import leave_after_the_first

            leave_after_the_first()
        raise


def ask(
    arguments: argparse.Namespace, questions: "Sequence[Question]", folder: Path, max_new_tokens: int
) -> dict[str, str] | None:
    """Return the responses by id, or ``None`` where another process returns them."""
    import torch

    from yivl.eval.runner import answer_questions, fingerprint

    local = os.environ.get("LOCAL_RANK")
    one_each = arguments.device == "auto" and local is not None and torch.cuda.is_available()
    loading = argparse.Namespace(**vars(arguments) | ({"device": f"cuda:{local}"} if one_each else {}))
    settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
    settings |= {"max_new_tokens": max_new_tokens}
    models = [arguments.model_path, arguments.model_base or adapter_base(arguments.model_path)]
    settings |= fingerprint(questions, arguments.data, models)
    return answer_questions(
        lambda: command_line.load(loading),
        questions,
        folder,
        settings,
        batch_size=arguments.batch_size,
        max_new_tokens=max_new_tokens,
    )


def adapter_base(model_path: str) -> str | None:
    """Return the model that an adapter folder names as its base."""
    from yivl.model.configuration import read_json

    path = Path(model_path).expanduser() / "adapter_config.json"
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def report(
    arguments: argparse.Namespace,
    folder: Path,
    scores: dict[str, Any],
    numbers: Counter[tuple[str, str]],
    published: dict[str, dict[str, float]],
) -> None:
    """Write and print the scores, and draw them beside the published ones.

    Args:
        arguments: Of the benchmark.
        folder: To write to.
        scores: From ``score_rows``.
        numbers: Of questions, by domain and subject.
        published: By model; a split's own name stands for all of it.
    """
    from yivl.eval.report import Table, draw_bars, write_reports

    overall = 100 * scores["overall"]
    domains = {domain: 100 * accuracy for domain, accuracy in scores["domains"].items()}
    rows: list[list[str | int | float]] = []
    for domain, accuracy in domains.items():
        inside = {subject: number for (its, subject), number in numbers.items() if its == domain}
        rows += [[domain, subject, n, 100 * scores["subjects"][subject]["acc"]] for subject, n in inside.items()]
        rows.append([domain, "all", sum(inside.values()), accuracy])
    rows.append(["all", "all", sum(numbers.values()), overall])
    table = Table(["domain", "subject", "questions", "accuracy %"], rows)
    names = ("benchmark", "data", "split", "protocol")
    about = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    about |= {"model": arguments.model_path, "questions": numbers.total(), "is_whole": numbers.total() == WHOLE}
    write_reports(folder, about | scores, table)
    theirs = {}
    if about["is_whole"]:
        theirs = {
            name: {("all" if key == arguments.split else key): value for key, value in values.items()}
            for name, values in published.items()
        }
    else:
        logger.warning("%d of %d questions are not the whole split, and no figure to compare", numbers.total(), WHOLE)
    title = f"{arguments.benchmark.upper()}, {arguments.split} split, {numbers.total():,} questions"
    draw_bars(folder / "scores.png", title, [*domains, "all"], {"this model": domains | {"all": overall}} | theirs)
    print(table.markdown())  # noqa: T201 (the result)


if __name__ == "__main__":
    command_line.run(main, less_memory="try a smaller --batch-size, --load-4bit, or a smaller checkpoint")
