"""Print one training row as the model sees it; the tokens the loss is computed on are green, or in brackets.

python -m yivl.data.show DATA ROW [--model-path CHECKPOINT]
"""

import argparse
import re
import sys
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from yivl import command_line
from yivl.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

if TYPE_CHECKING:
    from yivl.tokenization import YiTokenizer


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = command_line.Parser(prog="python -m yivl.data.show", description=__doc__)
    command_line.add_checkpoint_flags(parser)
    parser.add_argument(
        "words", nargs="*", metavar="DATA ROW", help=".json, .jsonl or .parquet file, and index of the row, from 0"
    )
    parser.add_argument("--data", "--data_path", help="the file, instead of DATA")
    arguments, apart = parser.parse_known_args()  # of values with flags between them, argparse takes the first ones
    words = [*arguments.words, *apart]
    if arguments.data is None and words:
        arguments.data = words.pop(0)
    if arguments.data is None or len(words) != 1:
        parser.error("expected a file and one row: DATA ROW")
    if not re.fullmatch(r"-?\d+", words[0]):
        parser.error(f"row: invalid int value: {words[0]!r}")
    arguments.row = int(words[0])
    return arguments


def main() -> None:
    """Print the row."""
    arguments = parse_args()
    command_line.log_to_stderr()

    from yivl.data.encoding import load_encoder
    from yivl.data.rows import RowError, log_notices, parse_row

    found = _find(arguments.data, arguments.row) if arguments.row >= 0 else None
    if found is None:
        raise RowError(f"{arguments.data}: no row {arguments.row}")
    origin, fields = found
    row = parse_row(fields, origin, image_folder="/")  # no image is read, so none is outside the folder
    log_notices([row])
    encoder = load_encoder(arguments.model_path, arguments.model_base, max_length=sys.maxsize)
    encoded = encoder.encode_text(row)
    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    for is_target, group in groupby(zip(encoded.input_ids, encoded.is_target, strict=True), key=lambda pair: pair[1]):
        # Bytes: a character outside the vocabulary is several tokens.
        text = b"".join(_bytes(token, encoder.tokenizer) for token, _ in group).decode("utf-8", "replace")
        print(f"{before}{text}{after}" if is_target else text, end="")  # noqa: T201 (the result)
    print(f"\n{len(encoded.input_ids)} tokens, {sum(encoded.is_target)} of them targets")  # noqa: T201


def _find(data: str, index: int) -> tuple[str, Any] | None:
    """Return origin and value of a row, or ``None`` if there are not as many."""
    if data.endswith((".json", ".jsonl")):  # read up to the row, not cached as a whole
        from yivl.data.rows import read_rows

        return next(islice(read_rows(data), index, None), None)

    from yivl.data.records import open_records

    records = open_records(data)
    return (records.origin(index), records[index]) if index < len(records) else None


def _bytes(token: int, tokenizer: "YiTokenizer") -> bytes:
    """Return the text of one token, leading space included, in UTF-8."""
    if token == IMAGE_TOKEN_INDEX:
        return DEFAULT_IMAGE_TOKEN.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


if __name__ == "__main__":
    command_line.run(main)
