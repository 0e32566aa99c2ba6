"""Publish a trained model with its card on the Hugging Face hub, or fetch one (docs/interop.md).

python scripts/hub.py upload FOLDER NAME/MODEL --scores out/mmmu/scores.json
python scripts/hub.py download NAME/MODEL FOLDER
python scripts/hub.py card FOLDER                   what the card would say, without writing or sending anything
"""

import argparse
from pathlib import Path

from yivl import command_line


def parse_args() -> argparse.Namespace:
    """Return the command and its flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    upload = commands.add_parser("upload", help="publish a checkpoint or adapter folder", allow_abbrev=False)
    upload.add_argument("folder", type=Path, help="checkpoint in the published layout, or LoRA adapter")
    upload.add_argument("repo_id", help="name on the hub; made if it is not there")
    upload.add_argument("--private", action="store_true", help="nobody else shall see it")
    upload.add_argument("--message", default="Upload a Yi-VL model", help="of the commit (default: %(default)s)")
    card = commands.add_parser("card", help="print the card of a folder", allow_abbrev=False)
    card.add_argument("folder", type=Path, help="checkpoint in the published layout, or LoRA adapter")
    for command in (upload, card):
        command.add_argument("--base-model", help="hub id of the model it was trained from, where a path is recorded")
        command.add_argument("--licence", help="where no LICENSE file lies in the folder, such as apache-2.0")
        command.add_argument(
            "--scores", type=Path, nargs="*", default=[], help="scores.json files of python -m yivl.eval, for the card"
        )
    download = commands.add_parser("download", help="fetch a checkpoint or adapter", allow_abbrev=False)
    download.add_argument("repo_id", help="name on the hub")
    download.add_argument("folder", type=Path, help="empty or new")
    download.add_argument("--revision", help="branch, tag or commit (default: the newest)")
    return parser.parse_args()


def main() -> None:
    """Send, fetch or print."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from yivl.export import hub
    from yivl.export.model_card import make_card

    if arguments.command == "download":
        hub.download(arguments.repo_id, arguments.folder, revision=arguments.revision)
        return
    about = {"base_model": arguments.base_model, "licence": arguments.licence, "scores": arguments.scores}
    if arguments.command == "upload":
        sent = hub.upload(
            arguments.folder, arguments.repo_id, private=arguments.private, message=arguments.message, **about
        )
        print(sent)
    else:
        print(make_card(arguments.folder, repo_id=None, **about), end="")


if __name__ == "__main__":
    command_line.run(main)
