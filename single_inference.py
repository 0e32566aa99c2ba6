"""Ask one question about an image.

python single_inference.py --image-file images/cats.jpg --question "What is in this image?"
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Final

from yivl import command_line

IMAGE: Final = Path(__file__).parent / "images/cats.jpg"
QUESTION: Final = "Describe the cats and what they are doing in detail."
"""The defaults of the reference. Source: 01-ai/Yi, VL/single_inference.py."""


def parse_args() -> argparse.Namespace:
    """Return the flags; those of the reference keep their names, docs/fidelity.md lists the defaults that differ."""
    parser = command_line.make_parser(__doc__)
    command_line.add_image_flags(
        parser, "path (or address, see --allow-remote); a --question without it has no image (default: images/cats.jpg)"
    )
    parser.add_argument("--question", "--query", type=command_line.utf8, help=f"(default: {QUESTION})")
    command_line.add_prompt_flags(parser)
    parser.refuse("--sep", "a question has one image; /image in cli.py adds more")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is generated")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command_line.add_sampling_flags(parser, top_p=1.0, max_new_tokens=1024)
    arguments = parser.parse_args()
    if arguments.json and arguments.stream:
        parser.error("--json and --stream exclude each other")
    if arguments.question is None:
        arguments.question = QUESTION
        arguments.image_file = str(IMAGE) if arguments.image_file is None else arguments.image_file
    return arguments


def main() -> None:
    """Load the model, ask, and print in the format of the reference."""
    arguments = parse_args()
    sampling, image = command_line.check_inputs(arguments)
    chat = command_line.load_chat(arguments)
    answer = chat.stream(arguments.question, image, **sampling)
    if arguments.json:
        text = "".join(answer)
        facts = {key: value for key, value in dataclasses.asdict(chat.last_answer).items() if key != "text"}
        result = {"question": arguments.question, "outputs": text, "model": chat.loaded.name, **facts}
        # An output that is not UTF-8 would replace characters, which JSON can escape.
        print(json.dumps(result, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf")))
        return
    print("----------")
    print("question:", arguments.question)
    print("outputs: ", end="", flush=True)
    for piece in answer if arguments.stream else ["".join(answer)]:
        print(piece, end="", flush=True)
    print("\n----------")


if __name__ == "__main__":
    command_line.run(main)
