"""Upload a trained model with its model card to the Hugging Face hub, or download one (docs/interop.md).

python scripts/hub.py upload FOLDER NAME/MODEL --scores out/mmmu/scores.json
python scripts/hub.py download NAME/MODEL FOLDER
python scripts/hub.py card FOLDER                   print the model card, without writing or uploading anything
"""

import argparse
from pathlib import Path

from yivl import command_line


def parse_args() -> argparse.Namespace:
    """Return the command and its flags."""
    parser = command_line.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    upload = commands.add_parser("upload", help="upload a checkpoint or adapter folder")
    upload.add_argument("folder", type=Path, help="checkpoint or LoRA adapter")
    upload.add_argument("repo_id", help="name on the hub; created if it does not exist")
    upload.add_argument("--private", action="store_true", help="create a private repository")
    upload.add_argument("--message", default="Upload a model", help="of the commit (default: %(default)s)")
    card = commands.add_parser("card", help="print the model card of a folder")
    card.add_argument("folder", type=Path, help="checkpoint or LoRA adapter")
    for command in (upload, card):
        command.add_argument("--base-model", help="hub id of the base model, where the folder records a path")
        command.add_argument(
            "--license", "--licence", dest="license_id", help="such as apache-2.0, if the folder has no LICENSE file"
        )
        command.add_argument(
            "--scores", type=Path, nargs="*", default=[], help="scores.json files of python -m yivl.eval"
        )
    download = commands.add_parser("download", help="download a checkpoint or adapter")
    download.add_argument("repo_id", help="name on the hub")
    download.add_argument("folder", type=Path, help="empty or new")
    download.add_argument("--revision", help="branch, tag or commit (default: the newest)")
    return parser.parse_args()


def main() -> None:
    """Upload, download or print."""
    arguments = parse_args()
    command_line.log_to_stderr()
    if arguments.command == "download":
        from yivl.checkpoint.hub import download

        download(arguments.repo_id, arguments.folder, revision=arguments.revision)
        return

    from yivl.export.model_card import make_card, publish

    about = {"base_model": arguments.base_model, "license_id": arguments.license_id, "scores": arguments.scores}
    if arguments.command == "upload":
        private, message = arguments.private, arguments.message
        print(publish(arguments.folder, arguments.repo_id, private=private, message=message, **about))
    else:
        print(make_card(arguments.folder, **about), end="")


if __name__ == "__main__":
    command_line.run(main)
