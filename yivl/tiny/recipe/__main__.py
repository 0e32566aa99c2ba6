"""Make what the three stages of the small model start from. Each phase goes on where it was stopped.

python -m yivl.tiny.recipe language_model --output_dir out/language_model
python -m yivl.tiny.recipe clip   --language_model out/language_model --output_dir out/clip
python -m yivl.tiny.recipe naming --language_model out/language_model --vision_tower out/clip --output_dir out/naming

scripts/train_tiny.sh runs them all, and the stages after them.
"""

import argparse
import json
import logging
from pathlib import Path

from yivl import command_line

logger = logging.getLogger(__name__)

STEPS = {"language_model": 8000, "clip": 300, "naming": 8000}
"""Of a full run; at the batch sizes of ``phases``. Source: ours."""


def main() -> None:
    """Run one phase and print its held-out scores beside their targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=tuple(STEPS))
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--language_model", help="folder of that phase; for the other two")
    parser.add_argument("--vision_tower", help="folder of the clip phase; for naming")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--questions", type=int, default=100, help="of each kind in the gate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    arguments = parser.parse_args()
    command_line.log_to_stderr()

    import torch

    from yivl.errors import YiVLError
    from yivl.tiny.recipe import phases

    if (arguments.phase == "language_model") != (arguments.language_model is None):
        raise YiVLError("--language_model is for clip and naming, and they need it")
    if (arguments.phase == "naming") != (arguments.vision_tower is not None):
        raise YiVLError("--vision_tower is for naming, and it needs it")
    steps = STEPS[arguments.phase] if arguments.steps is None else arguments.steps
    if min(steps, arguments.questions, arguments.threads) < 1:
        raise YiVLError("--steps, --questions and --threads are at least 1")
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output_dir).expanduser()
    if arguments.phase == "language_model":
        gate = phases.language_model(folder, steps, arguments.questions)
    elif arguments.phase == "clip":
        gate = phases.clip(Path(arguments.language_model), folder, steps, arguments.questions)
    else:
        start = Path(arguments.language_model), Path(arguments.vision_tower)
        gate = phases.naming(*start, folder, steps, arguments.questions)
    (phases.training_folder(folder) / "gate.json").write_text(
        json.dumps([score.__dict__ for score in gate], indent=2) + "\n"
    )
    for score in gate:
        logger.info("%-28s %5.1f %%   target %s", score.name, score.reached, score.target or "none")


if __name__ == "__main__":
    command_line.run(main)
