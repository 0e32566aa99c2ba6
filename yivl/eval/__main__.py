"""Measure the answers of a model.

python -m yivl.eval rows --data rows.json --image-folder images --group-by kind language --output out/evaluation

``rows`` asks the first question of every row alone, greedily, and compares the answer with that of the row, exactly.
Written are answers.jsonl and scores.json; a table of the scores is printed.
"""

import os
from pathlib import Path

from yivl import entry


def main() -> None:
    """Ask, compare, report."""
    parser = entry.make_parser(__doc__)
    parser.add_argument("benchmark", choices=("rows",), help="what is measured")
    parser.add_argument("--data", required=True, help="rows in the published form, .json or .jsonl")
    parser.add_argument("--image-folder", default=".", help="where relative picture paths start (default: %(default)s)")
    parser.add_argument("--group-by", nargs="*", default=[], help="fields of the rows that have scores of their own")
    parser.add_argument(
        "--pictures", choices=("own", "another", "none"), default="own", help="shown with each question; a control"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered together (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args()
    entry.log_to_stderr()  # before the imports, which have things to say

    from yivl.errors import YiVLError

    if arguments.batch_size < 1:
        raise YiVLError("--batch-size is at least 1")

    from yivl.eval.rows import answer_items, read_items, score, table, write_report

    data, images = Path(arguments.data).expanduser(), Path(arguments.image_folder).expanduser()
    items = read_items(data, images, arguments.group_by)
    loaded = entry.load(arguments)
    answers = answer_items(
        loaded,
        items,
        arguments.pictures,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    scores = score(items, answers)
    about = {"data": os.fspath(data), "model": arguments.model_path, "pictures": arguments.pictures}
    write_report(Path(arguments.output).expanduser(), items, answers, scores, about)
    print(table(scores, arguments.group_by))  # noqa: T201 (the result)


if __name__ == "__main__":
    entry.run(main)
