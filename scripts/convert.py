"""Convert checkpoints and training data between formats (docs/interop.md).

python scripts/convert.py safetensors SOURCE TARGET         .bin checkpoint to safetensors; prints SHA-256 hashes
python scripts/convert.py open-clip WEIGHTS CONFIG TARGET   open_clip visual tower to a ViT folder
python scripts/convert.py to-hf SOURCE TARGET               Yi-VL checkpoint to the format of Yi-VL-6B-hf
python scripts/convert.py from-hf SOURCE TARGET             the reverse; --like FOLDER for files it lacks
python scripts/convert.py to-sglang SOURCE TARGET           Yi-VL checkpoint to the folder that SGLang reads
python scripts/convert.py to-gguf SOURCE TARGET             Yi-VL checkpoint to two GGUF files for llama.cpp
python scripts/convert.py to-llamafactory ROWS FOLDER       training data and recipes for LLaMA-Factory
python scripts/convert.py from-llamafactory INFO NAME ROWS  the reverse
"""

import argparse
from pathlib import Path

from yivl import command_line


def parse_args() -> argparse.Namespace:
    """Return the command and its paths."""
    parser = command_line.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, **arguments: str) -> command_line.Parser:
        command: command_line.Parser = commands.add_parser(name, help=about, description=about)
        for argument, meaning in arguments.items():
            command.add_argument(argument, type=Path, help=meaning)
        return command

    checkpoint, written = "Yi-VL checkpoint folder or hub id", "folder to write; replaced if it holds a checkpoint"
    add(
        "safetensors",
        "convert the .bin files of a checkpoint to safetensors and print SHA-256 hashes",
        source="checkpoint folder with .bin files",
        target=written,
    )
    add(
        "open-clip",
        "convert an open_clip visual tower to a ViT folder",
        weights="open_clip_pytorch_model.bin or open_clip_model.safetensors",
        config="the open_clip_config.json of the same model",
        target=written,
    )
    add("to-hf", "convert a Yi-VL checkpoint to the format of Yi-VL-6B-hf", source=checkpoint, target=written)
    from_hf = add(
        "from-hf",
        "convert the format of Yi-VL-6B-hf to a Yi-VL checkpoint",
        source="folder in the format of Yi-VL-6B-hf, or hub id",
        target=written,
    )
    from_hf.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="Yi-VL checkpoint, Yi model or -hf folder that has the tokenizer.model and the small files that "
        "transformers 5 and LLaMA-Factory do not write",
    )
    add("to-sglang", "write the folder that SGLang's Yi-VL class reads", source=checkpoint, target=written)
    gguf = add(
        "to-gguf",
        "write two GGUF files for llama.cpp",
        source=checkpoint,
        target="folder for the two files; neither may exist",
    )
    gguf.add_argument(
        "--dtype",
        default="float16",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the matrices (default: %(default)s)",
    )
    to_factory = add(
        "to-llamafactory",
        "convert training data to a dataset of LLaMA-Factory, with the recipes NAME_full.yaml and NAME_lora.yaml",
        source="rows, .json or .jsonl",
        target="dataset_dir of LLaMA-Factory; files in it other than the dataset are kept",
    )
    to_factory.add_argument("--name", help="of the dataset (default: that of the file)")
    to_factory.add_argument(
        "--model-path",
        default="BUAADreamer/Yi-VL-6B-hf",
        help="model of the recipes: folder in the format of Yi-VL-6B-hf, or hub id (default: %(default)s)",
    )
    to_factory.add_argument(
        "--image-folder", type=Path, help="start of relative image paths in the recipes (default: the dataset_dir)"
    )
    from_factory = add(
        "from-llamafactory",
        "convert a dataset of LLaMA-Factory to training data",
        source="dataset_info.json that declares it",
    )
    from_factory.add_argument("name", help="of the dataset")
    from_factory.add_argument("target", type=Path, help=".json file to write; replaced if it exists")
    return parser.parse_args()


def main() -> None:
    """Run the conversion."""
    arguments = parse_args()
    command_line.log_to_stderr()
    if arguments.command == "open-clip":
        from yivl.checkpoint.conversion import open_clip_to_vit

        open_clip_to_vit(arguments.weights, arguments.config, arguments.target)
    elif arguments.command == "safetensors":
        from yivl.checkpoint.conversion import bin_to_safetensors

        for name, digest in bin_to_safetensors(arguments.source, arguments.target).items():
            print(f"{digest}  {name}")
    elif arguments.command == "to-hf":
        from yivl.export.hf import to_hf

        to_hf(arguments.source, arguments.target)
    elif arguments.command == "from-hf":
        from yivl.export.hf import from_hf

        from_hf(arguments.source, arguments.target, like=arguments.like)
    elif arguments.command == "to-sglang":
        from yivl.export.sglang import to_sglang

        to_sglang(arguments.source, arguments.target)
    elif arguments.command == "to-gguf":
        from yivl.export.gguf import export_gguf

        for path in export_gguf(arguments.source, arguments.target, dtype=arguments.dtype):
            print(path)
    elif arguments.command == "to-llamafactory":
        from yivl.export.llamafactory import to_llamafactory
        from yivl.export.llamafactory_recipes import write_recipes

        name = arguments.name or arguments.source.stem
        print(f"{to_llamafactory(arguments.source, arguments.target, name=name)} rows")
        for path in write_recipes(
            arguments.target,
            name=name,
            model=arguments.model_path,
            deepspeed=Path(__file__).with_name("zero3.json"),
            image_folder=arguments.image_folder,
        ):
            print(path)
    else:
        from yivl.export.llamafactory import from_llamafactory

        print(f"{from_llamafactory(arguments.source, arguments.name, arguments.target)} rows")


if __name__ == "__main__":
    command_line.run(main, less_memory="use a machine with more memory than the checkpoint takes")
