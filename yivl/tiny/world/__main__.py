"""Generate data of the synthetic world: captions as tar shards, dialogues as JSON rows, or an evaluation set.

python -m yivl.tiny.world captions    --output_dir data/captions --number 20000
python -m yivl.tiny.world dialogues   --output_dir data/dialogues --number 60000
python -m yivl.tiny.world examination --output_dir data/examination --split scenes --number 200
python -m yivl.tiny.world examples    --output_dir images

The output is deterministic: the same command generates the same scenes and texts on every machine.
"""

from pathlib import Path

from yivl import command_line
from yivl.errors import YiVLError
from yivl.tiny.world import writing
from yivl.tiny.world.example_images import write_example_images
from yivl.tiny.world.scenes import SPLITS


def main() -> None:
    """Generate what the flags select."""
    parser = command_line.Parser(description=__doc__)
    parser.add_argument("what", choices=("captions", "dialogues", "examination", "examples"))
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--number", type=int, default=1000, help="scenes; for examination, questions of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="image side in pixels (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, help="split of the scenes; only for examination")
    parser.add_argument("--json", action="store_true", help="dialogues: one answer in JSON each, an untrained skill")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir).expanduser()
    if arguments.number < 1 or arguments.side < 32:
        raise YiVLError("--number must be at least 1 and --side at least 32")
    if (arguments.what == "examination") != (arguments.split is not None):
        raise YiVLError("--split is required for examination; captions and dialogues use the training split")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(arguments.first, arguments.first + arguments.number)
    if arguments.what == "captions":
        writing.write_captions(folder, numbers, arguments.side)
    elif arguments.what == "dialogues":
        writing.write_dialogues(folder, numbers, arguments.side, as_json=arguments.json)
    elif arguments.what == "examination":
        writing.write_evaluation_set(folder, arguments.split, arguments.number, arguments.side)
    else:
        write_example_images(folder)


if __name__ == "__main__":
    command_line.run(main)
