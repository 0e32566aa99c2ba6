"""Turn checkpoint files from one form into another.

python scripts/convert.py safetensors SOURCE TARGET         .bin checkpoint to safetensors; prints SHA-256 hashes
python scripts/convert.py open-clip WEIGHTS CONFIG TARGET   open_clip visual tower to a ViT folder
"""

import argparse
from pathlib import Path

from yivl import entry


def parse_args() -> argparse.Namespace:
    """Return the command and its paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("safetensors", help="turn the .bin files of a checkpoint into safetensors")
    command.add_argument("source", type=Path, help="checkpoint folder with .bin files")
    command.add_argument("target", type=Path, help="folder to write; replaced if it exists")
    command = commands.add_parser("open-clip", help="turn an open_clip visual tower into a ViT folder")
    command.add_argument("weights", type=Path, help="open_clip_pytorch_model.bin or open_clip_model.safetensors")
    command.add_argument("config", type=Path, help="the open_clip_config.json beside it")
    command.add_argument("target", type=Path, help="folder to write; replaced if it exists")
    return parser.parse_args()


def main() -> None:
    """Run the conversion."""
    arguments = parse_args()

    from yivl.model.conversion import bin_to_safetensors, open_clip_to_vit

    if arguments.command == "open-clip":
        open_clip_to_vit(arguments.weights, arguments.config, arguments.target)
        return
    for name, digest in bin_to_safetensors(arguments.source, arguments.target).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    entry.run(main)
