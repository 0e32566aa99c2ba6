"""Merge a LoRA adapter, and what was trained beside it, into its unquantized base.

python -m yivl.train.merge --model-path BASE --lora-path ADAPTER --save-model-path OUT
"""

import argparse
import logging
import os
import shutil
from pathlib import Path

from yivl import command_line

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m yivl.train.merge",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", required=True, help="base checkpoint, folder or hub id")
    parser.add_argument("--lora-path", required=True, help="adapter folder, or one of its checkpoint-N folders")
    parser.add_argument("--save-model-path", required=True, help="folder to write, in the published layout")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the merged weights (default: that of the base)",
    )
    parser.add_argument("--device", default="cpu", help="where to merge (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Load the base, add the adapter, save."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from yivl.checkpoint.loading import load_adapter, load_model
    from yivl.checkpoint.saving import check_replaceable, checkpoint_dir, write_checkpoint
    from yivl.errors import CheckpointError
    from yivl.model.configuration import read_json
    from yivl.train.resume import ARGUMENTS, RECORD
    from yivl.train.run_log import LOG

    base, adapter, target = (
        os.path.expanduser(path) for path in (arguments.model_path, arguments.lora_path, arguments.save_model_path)
    )
    if os.path.realpath(target) in (os.path.realpath(base), os.path.realpath(adapter)):
        raise CheckpointError(f"{target}: is what is merged; give another --save-model-path")
    check_replaceable(target)  # before minutes of loading
    if not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise CheckpointError(f"{adapter}: no adapter folder: it has no adapter_config.json")
    trained_on = str(read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path"))
    if os.path.realpath(trained_on) != os.path.realpath(base) and trained_on != base:
        logger.warning("the adapter says that it was trained on %s; it is merged into %s", trained_on, base)
    loaded = load_model(base, device=arguments.device, dtype=arguments.dtype)
    model = load_adapter(loaded.model, adapter, merge=True)
    with checkpoint_dir(target) as new:
        write_checkpoint(model, new, tokenizer=loaded.tokenizer, image_processor=loaded.image_processor.clip_processor)
        for name in (ARGUMENTS, RECORD, LOG):  # how it was trained, for its model card
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, new / name)
    logger.info("the merged model is in %s", target)


if __name__ == "__main__":
    command_line.run(main)
