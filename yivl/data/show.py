"""Print one training row as the model sees it, its targets in colour.

python -m yivl.data.show DATA ROW --model-path CHECKPOINT
"""

import argparse
import re
import sys
from itertools import groupby, islice
from pathlib import Path

from yivl import command_line
from yivl.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m yivl.data.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="JSON or JSONL file of rows")
    parser.add_argument("row", type=int, help="which row, from 0")
    parser.add_argument("--model-path", required=True, help="checkpoint folder whose tokenizer is used")
    return parser.parse_args()


def main() -> None:
    """Print the row; targets are green in a terminal and in brackets elsewhere."""
    arguments = parse_args()

    from yivl.data.rows import RowError, parse_row, read_rows
    from yivl.tokenization import encode_turns, load_tokenizer

    found = next(islice(read_rows(arguments.data), arguments.row, None), None) if arguments.row >= 0 else None
    if found is None:
        raise RowError(f"{arguments.data}: no row {arguments.row}")
    origin, fields = found
    tokenizer = load_tokenizer(Path(arguments.model_path))
    row = parse_row(fields, origin)
    encoded = encode_turns(row.turns, tokenizer)
    before, after = (_GREEN, _PLAIN) if sys.stdout.isatty() else ("[", "]")
    for is_target, group in groupby(zip(encoded.input_ids, encoded.is_target, strict=True), key=lambda pair: pair[1]):
        # Bytes, because a character outside the vocabulary is several tokens.
        text = b"".join(_bytes(token, tokenizer) for token, _ in group).decode("utf-8", "replace")
        print(f"{before}{text}{after}" if is_target else text, end="")  # noqa: T201 (the result)
    print(f"\n{len(encoded.input_ids)} tokens, {sum(encoded.is_target)} of them targets")  # noqa: T201


def _bytes(token: int, tokenizer: object) -> bytes:
    """Return the text of one token on its own, blanks included, in UTF-8."""
    if token == IMAGE_TOKEN_INDEX:
        return DEFAULT_IMAGE_TOKEN.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))  # type: ignore[attr-defined]
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


if __name__ == "__main__":
    command_line.run(main)
