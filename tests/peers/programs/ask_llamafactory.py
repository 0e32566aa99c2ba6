"""Ask an -hf folder with LLaMA-Factory: python ask_llamafactory.py MODEL CASES RESULT."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from llamafactory.chat import ChatModel


def main(folder: str, cases: Path, result: Path) -> None:
    """Write the greedy answers."""
    arguments = {"model_name_or_path": folder, "template": "yi_vl", "do_sample": False}
    # Pillow for images: torchvision resizes a little differently.
    chat = ChatModel(arguments | {"max_new_tokens": 64, "use_fast_tokenizer": False})
    answers = []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        messages = [{"role": "user", "content": f"<image>\n{case['question']}"}]
        [response] = chat.chat(messages, images=[case["image"]])
        answers.append(response.response_text.strip())
    versions = f"{version('llamafactory')}, transformers {version('transformers')}"
    result.write_text(json.dumps({"version": versions, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
