"""Train what the three stages of the small model start from. A phase that was interrupted resumes.

python -m yivl.tiny.recipe language_model --output_dir out/language_model
python -m yivl.tiny.recipe clip   --language_model out/language_model --output_dir out/clip
python -m yivl.tiny.recipe naming --language_model out/language_model --vision_tower out/clip --output_dir out/naming

scripts/train_tiny.sh runs all of them and then the stages.
"""

import argparse
import logging
from importlib import import_module
from pathlib import Path

from yivl import command_line
from yivl.errors import YiVLError

logger = logging.getLogger(__name__)

# Optimizer steps of a full run, and the folders that a phase reads.
PHASES = {
    "language_model": (8000, ()),
    "clip": (300, ("language_model",)),
    "naming": (8000, ("language_model", "vision_tower")),
}


def main() -> None:
    """Run one phase and print its held-out scores with their targets."""
    parser = command_line.Parser(description=__doc__)
    subparsers = parser.add_subparsers(dest="phase", required=True)
    for phase, (steps, names) in PHASES.items():
        flags = subparsers.add_parser(phase, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name in names:
            flags.add_argument(f"--{name}", type=Path, required=True, help="output folder of an earlier phase")
        flags.add_argument("--output_dir", type=Path, required=True, help="folder to write")
        flags.add_argument("--steps", type=int, default=steps, help="optimizer steps")
        flags.add_argument("--questions", type=int, default=100, help="held-out questions or images of each kind")
        flags.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    command_line.log_to_stderr()
    if min(arguments.steps, arguments.questions, arguments.threads) < 1:
        raise YiVLError("--steps, --questions and --threads must be at least 1")

    import torch

    from yivl.checkpoint.atomic import write_json
    from yivl.tiny.recipe.loop import training_folder

    torch.set_num_threads(arguments.threads)
    train = import_module(f"yivl.tiny.recipe.{arguments.phase}").train
    folder = arguments.output_dir.expanduser()
    inputs = [getattr(arguments, name).expanduser() for name in PHASES[arguments.phase][1]]
    scores = train(*inputs, folder, arguments.steps, arguments.questions)
    write_json(training_folder(folder) / "gate.json", [score._asdict() for score in scores], sort_keys=False)
    for score in scores:
        logger.info("%-28s %5.1f %%   target %s", score.name, score.reached, score.target or "none")


if __name__ == "__main__":
    command_line.run(main)
