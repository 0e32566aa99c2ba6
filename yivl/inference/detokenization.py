"""Tokens to text one at a time, as an answer grows."""

from typing import Final

from yivl.tokenization import WORD_START, YiTokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_UTF8_LENGTHS: Final = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}
"""Bytes of a character, by the upper half of the first one."""


class Detokenizer:
    """Decodes tokens one at a time; special tokens are skipped.

    The pieces and the final ``flush`` join to ``tokenizer.decode(ids, skip_special_tokens=True)``. The work of a token
    does not depend on how many came before it.
    """

    def __init__(self, tokenizer: YiTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_tokens)
        self._has_text = False
        self._start_run()

    def _start_run(self) -> None:
        """Begin the tokens up to the next one with spaces around it."""
        self._leading: list[str] | None = []  # SentencePiece drops whitespace only before the first text
        self._is_first = True
        self._bytes = b""
        self._needs_space = self._has_text

    def add(self, token: int) -> str:
        """Return the text that the token completes; bytes of an incomplete character wait for the next ones."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or piece in self._special:
            return ""
        if piece in self._tokenizer.spaced_tokens:
            text = self._take(self._incomplete())
            self._needs_space = self._has_text
            text += self._take(piece)
            self._start_run()
            return text
        if self._is_first:
            piece, self._is_first = piece.removeprefix(WORD_START), False
        model = self._tokenizer.sp_model
        if model.is_byte(model.piece_to_id(piece)):
            self._leading = None
            self._bytes += bytes([int(piece[3:5], 16)])  # spelled <0xE4>
            return self._take(self._complete_characters())
        return self._take(self._incomplete() + self._surface(piece))

    def flush(self) -> str:
        """Return the end of the text: a replacement character for each byte of an incomplete character."""
        text = self._take(self._incomplete())
        # The reference puts a space before the last run even if its tokens have no text.
        return " " if self._needs_space and not self._is_first else text

    def _take(self, text: str) -> str:
        """Return text of this run, its first one with the space after a token that has spaces around it."""
        if not text:
            return ""
        space = " " if self._needs_space else ""
        self._has_text, self._needs_space = True, False
        return space + text

    def _incomplete(self) -> str:
        """Return a replacement character for each byte of an incomplete character and forget them."""
        text, self._bytes = _REPLACEMENT * len(self._bytes), b""
        return text

    def _surface(self, piece: str) -> str:
        """Return the text of a piece at this place."""
        if self._leading is None:  # after other text, SentencePiece keeps the spaces of a piece
            return str(self._tokenizer.sp_model.decode(["x", piece]))[1:]
        self._leading.append(piece)
        text = str(self._tokenizer.sp_model.decode(self._leading))
        if text:
            self._leading = None
        return text

    def _complete_characters(self) -> str:
        """Return the characters that the bytes complete, and a replacement character for each invalid byte."""
        text = ""
        while self._bytes:
            length = _UTF8_LENGTHS.get(self._bytes[0] >> 4, 1)
            try:
                text += self._bytes[:length].decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text, length = text + _REPLACEMENT, 1
            self._bytes = self._bytes[length:]
        return text
