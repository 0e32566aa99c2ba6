"""Merge a LoRA adapter, and the projector or ViT trained with it, into its unquantized base.

python -m yivl.train.merge --model-path BASE --lora-path ADAPTER --save-model-path OUT
python -m yivl.train.merge --model-path ADAPTER --model-base BASE --save-model-path OUT    the same, as in LLaVA
"""

import argparse
import logging
import os
import shutil
from pathlib import Path

from yivl import command_line

logger = logging.getLogger(__name__)


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = command_line.Parser(prog="python -m yivl.train.merge", description=__doc__)
    parser.add_argument("--model-path", "--model_name_or_path", required=True, help="base checkpoint, folder or hub id")
    adapter = parser.add_mutually_exclusive_group(required=True)
    adapter.add_argument("--lora-path", help="adapter folder, or one of its checkpoint-N folders")
    adapter.add_argument("--model-base", help="base checkpoint; --model-path is the adapter folder then")
    parser.add_argument(
        "--save-model-path", "--output", "--output_dir", required=True, help="checkpoint folder to write"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the merged weights (default: that of the base)",
    )
    parser.add_argument("--device", default="cpu", help="device to merge on (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.model_base is not None:
        arguments.model_path, arguments.lora_path = arguments.model_base, arguments.model_path
    return arguments


def main() -> None:
    """Load the base, merge the adapter, save the result."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from yivl.checkpoint.format import ADAPTER_CONFIG, ARGUMENTS, LOG, RECORD, read_json
    from yivl.checkpoint.loading import load_model
    from yivl.checkpoint.saving import check_replaceable, checkpoint_dir, write_checkpoint
    from yivl.errors import CheckpointError

    base, adapter, target = (
        os.path.expanduser(path) for path in (arguments.model_path, arguments.lora_path, arguments.save_model_path)
    )
    if os.path.realpath(target) in (os.path.realpath(base), os.path.realpath(adapter)):
        raise CheckpointError(f"{target}: is an input of the merge; give another --save-model-path")
    check_replaceable(target)  # before minutes of loading
    if not os.path.isfile(os.path.join(adapter, ADAPTER_CONFIG)):
        raise CheckpointError(f"{adapter}: {ADAPTER_CONFIG} is missing; give the folder of a LoRA adapter")
    trained_on = read_json(Path(adapter) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if trained_on != base and os.path.realpath(str(trained_on)) != os.path.realpath(base):
        logger.warning("the adapter was trained on %s, and is merged into %s", trained_on, base)
    loaded = load_model(adapter, model_base=base, device=arguments.device, dtype=arguments.dtype, merge_adapter=True)
    with checkpoint_dir(target) as new:
        clip_processor = loaded.image_processor.clip_processor
        write_checkpoint(loaded.model, new, tokenizer=loaded.tokenizer, image_processor=clip_processor)
        for name in (ARGUMENTS, RECORD, LOG):  # for the model card
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, new / name)
    logger.info("the merged model is in %s", target)


if __name__ == "__main__":
    command_line.run(main)
