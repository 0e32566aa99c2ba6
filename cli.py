"""Chat about images in the terminal; /help lists the commands.

python cli.py --image-file images/cats.jpg
"""

import argparse

from yivl import command_line


def parse_args() -> argparse.Namespace:
    """Return the flags; those of the reference keep their names, docs/fidelity.md lists the defaults that differ."""
    parser = command_line.make_parser(__doc__)
    command_line.add_image_flags(parser, "image of the first question; /image adds more")
    command_line.add_prompt_flags(parser)
    parser.refuse("--debug", "/params and /save show the state")
    # top-p 0.8: the reference cli.py passes none, so generation_config.json decides.
    command_line.add_sampling_flags(parser, top_p=0.8, max_new_tokens=512)
    return parser.parse_args()


def main() -> None:
    """Load the model, then chat."""
    arguments = parse_args()
    sampling, image = command_line.check_inputs(arguments)
    chat = command_line.load_chat(arguments)

    from yivl.serve.terminal import Terminal

    Terminal(chat, sampling, image=image).run()


if __name__ == "__main__":
    command_line.run(main)
