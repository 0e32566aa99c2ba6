"""Write pictures of the world for training: captions as tar shards, conversations as rows; or an examination.

python -m yivl.tiny.world captions    --output_dir data/captions --number 20000
python -m yivl.tiny.world dialogues   --output_dir data/dialogues --number 60000
python -m yivl.tiny.world examination --output_dir data/examination --split scenes --number 200
python -m yivl.tiny.world examples    --output_dir images

The same command writes the same scenes and texts on every machine.
"""

import argparse
from pathlib import Path

from yivl import command_line
from yivl.errors import YiVLError
from yivl.tiny.world import writing
from yivl.tiny.world.examples import write_examples
from yivl.tiny.world.scenes import SPLITS


def main() -> None:
    """Write what the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("captions", "dialogues", "examination", "examples"))
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--number", type=int, default=1000, help="scenes; of an examination: questions of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="pixels on a side (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, help="of an examination: where its scenes are from")
    parser.add_argument(
        "--json", action="store_true", help="dialogues: one answer in JSON each, a skill no stage teaches"
    )
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir).expanduser()
    if arguments.number < 1 or arguments.side < 32:
        raise YiVLError("--number is at least 1 and --side at least 32")
    if (arguments.what == "examination") != (arguments.split is not None):
        raise YiVLError("--split belongs to an examination; captions and dialogues are of the training split")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(arguments.first, arguments.first + arguments.number)
    if arguments.what == "captions":
        writing.captions(folder, numbers, arguments.side)
    elif arguments.what == "dialogues":
        writing.dialogues(folder, numbers, arguments.side, as_json=arguments.json)
    elif arguments.what == "examples":
        write_examples(folder)
    else:
        writing.examination(folder, arguments.split, arguments.number, arguments.side)


if __name__ == "__main__":
    command_line.run(main)
