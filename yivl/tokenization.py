"""Prompt text to token ids and back. The only module that knows how an image slot becomes ``-200``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

from yivl.constants import ASSISTANT, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX, SYSTEM_PROMPT
from yivl.conversation import Turn, render_chunks
from yivl.errors import CheckpointError
from yivl.files.json_files import read_json
from yivl.files.validation import library_errors

_WORD_START = "▁"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UTF8_LENGTHS = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}
"""Bytes of a character, by the upper half of the first one."""
_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = ("tokenizer.model", *_JSON_FILES)


class YiTokenizer(LlamaTokenizer):
    """Llama tokenizer that decodes exactly as the reference implementation does.

    The reference decodes with SentencePiece, which keeps the valid characters of a run of byte tokens and drops a
    leading space. The ``tokenizers`` decoder turns the whole run into replacement characters and keeps the space.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sp_model = SentencePieceProcessor(model_file=self.vocab_file)
        folder = Path(self.vocab_file).parent
        self.files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        """Contents of the files it was loaded from, by name."""

    @cached_property
    def longest_piece(self) -> int:
        """Number of characters of the longest token."""
        return max(len(self.sp_model.id_to_piece(index)) for index in range(self.sp_model.get_piece_size()))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> tuple[str, ...]:
        """Write the files that were loaded; Yi-VL adds no tokens."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (target / name).write_bytes(content)
        return tuple(str(target / name) for name in self.files)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        tokens = self.convert_ids_to_tokens([token_ids] if isinstance(token_ids, int) else token_ids)
        tokens = [token for token in tokens if token is not None]  # ids that only pad the vocabulary have no text
        special = set(self.all_special_tokens)
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in special]
        if tokens and tokens[0].startswith(_WORD_START):
            tokens[0] = tokens[0][1:]
        text, after_special = "", False
        run: list[str] = []
        for index, token in enumerate(tokens):
            if token in special:
                # The reference puts a space before the text that a special token follows (golden vectors).
                text += (" " if index and not after_special else "") + self.sp_model.decode(run) + token
                run, after_special = [], True
            else:
                run.append(token)
                after_special = False
        return text + str(self.sp_model.decode(run))


class Detokenizer:
    """Decodes tokens one at a time; special tokens are skipped.

    The pieces and the final ``flush`` join to ``tokenizer.decode(ids, skip_special_tokens=True)``. The work of a token
    does not depend on how many came before it.
    """

    def __init__(self, tokenizer: YiTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_tokens)
        self._leading: list[str] | None = []  # SentencePiece drops whitespace only before the first text
        self._is_first = True
        self._bytes = b""

    def add(self, token: int) -> str:
        """Return the text that the token completes; bytes of an incomplete character wait for the next ones."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or piece in self._special:
            return ""
        if self._is_first:
            piece, self._is_first = piece.removeprefix(_WORD_START), False
        model = self._tokenizer.sp_model
        if model.is_byte(model.piece_to_id(piece)):
            self._leading = None
            self._bytes += bytes([int(piece[3:5], 16)])  # spelled <0xE4>
            return self._complete_characters()
        return self.flush() + self._surface(piece)

    def flush(self) -> str:
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


def load_tokenizer(folder: str | os.PathLike[str]) -> YiTokenizer:
    """Return the tokenizer of a checkpoint folder.

    ``add_prefix_space=False`` matches the SentencePiece model, which has no dummy prefix; without it most texts
    tokenize differently from the reference.

    Raises:
        CheckpointError: If the folder has no ``tokenizer.model``, or a damaged one.
    """
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model; download the whole checkpoint")
    read_sentencepiece(path)
    for name in _JSON_FILES:
        if (path.parent / name).is_file():
            read_json(path.parent / name)
    with library_errors(f"{folder}/tokenizer_config.json"):
        # A path in tokenizer_config.json must not replace that of the folder.
        return YiTokenizer.from_pretrained(  # type: ignore[no-any-return]
            os.fspath(folder), add_prefix_space=False, vocab_file=os.fspath(path)
        )


def check_vocabulary(folder: str | os.PathLike[str], tokenizer: YiTokenizer, vocab_size: int) -> None:
    """Check that a model has an embedding for every id that text becomes.

    Args:
        folder: Of the tokenizer, for the error.
        tokenizer: Loaded from the folder.
        vocab_size: Of the model.

    Raises:
        CheckpointError: If an id is too large.
    """
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    largest = max(*vocabulary.values(), tokenizer.sp_model.get_piece_size() - 1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has the id {largest}; expected less than vocab_size, {vocab_size}"
        )


def read_sentencepiece(path: Path) -> SentencePieceProcessor:
    """Return the SentencePiece model in a ``tokenizer.model``.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        return SentencePieceProcessor(model_file=os.fspath(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model, or a git-lfs pointer; download it again") from error


def tokenize_chunks(chunks: Sequence[str], tokenizer: Any, *, text_is_data: bool = True) -> list[int]:
    """Return the ids of prompt chunks, ``-200`` between neighbors.

    Every chunk is tokenized separately, as in the reference. With ``text_is_data`` a special token spelled out in the
    text, such as ``<|im_end|>``, stays ordinary text; without it, it becomes its control id as in the reference.
    """
    # verbose=False: callers check the sequence length after fusion, image patches included.
    settings = {"add_special_tokens": False, "split_special_tokens": text_is_data, "verbose": False}
    texts = (chunk.encode("utf-8", "replace").decode("utf-8") for chunk in chunks)  # unpaired surrogates
    return join_chunks([tokenizer(text, **settings).input_ids for text in texts])


def join_chunks(parts: Sequence[Sequence[int]]) -> list[int]:
    """Return the ids of tokenized chunks as one prompt, ``-200`` between neighbors."""
    first, *rest = parts
    return [*first, *(token for part in rest for token in (IMAGE_TOKEN_INDEX, *part))]


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Return the ids of a prompt with ``<image_placeholder>`` at image slots, exactly as the reference does.

    Special tokens in the text become control ids. A prompt that starts with the literal ``<|startoftext|>`` loses the
    first token of every later chunk: a bug of the reference, kept because callers compare ids with it.

    Raises:
        ValueError: If ``return_tensors`` is neither ``None`` nor ``"pt"``.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r}; expected None or 'pt'")
    first, *rest = (
        tokenize_chunks([chunk], tokenizer, text_is_data=False) for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)
    )
    skipped = int(first[:1] == [tokenizer.bos_token_id])
    ids = first + [token for chunk in rest for token in [image_token_index, *chunk[skipped:]]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


@dataclass(frozen=True)
class EncodedTurns:
    """A tokenized conversation whose turns all have answers."""

    input_ids: list[int]
    """Token ids, ``-200`` at image slots."""
    is_target: list[bool]
    """Whether the loss is computed on a token: each answer and the stop string that ends it."""


def encode_turns(turns: Sequence[Turn], tokenizer: Any, system: str = SYSTEM_PROMPT) -> EncodedTurns:
    """Return the ids of answered turns and the tokens the loss is computed on.

    The ids before an answer equal the prompt of ``Chat`` token for token. This is checked: a tokenizer that merges
    text across that boundary would train on one prompt and answer another.

    Raises:
        ValueError: If a turn has no answer.
        CheckpointError: If the tokenizer merges text across the boundary of an answer.
    """

    @cache  # neighboring prompts share most of their chunks
    def ids_of(chunk: str) -> list[int]:
        return tokenize_chunks([chunk], tokenizer)

    def encode(chunks: Sequence[str]) -> list[int]:
        return join_chunks([ids_of(chunk) for chunk in chunks])

    messages = [message for turn in turns for message in turn.messages()]
    input_ids = encode(render_chunks(messages, system))
    is_target = [False] * len(input_ids)
    for index, turn in enumerate(turns):
        if turn.answer is None:
            raise ValueError(f"turn {index} has no answer")
        question, finished = 2 * index + 1, 2 * index + 2
        prompt = encode(render_chunks([*messages[:question], (ASSISTANT, None)], system))
        # Up to the stop string, without the space before the next role.
        chunks = render_chunks(messages[:finished], system)
        answered = encode([*chunks[:-1], chunks[-1].removesuffix(" ")])
        if input_ids[: len(answered)] != answered or answered[: len(prompt)] != prompt:
            raise CheckpointError(
                "tokenizer.model: merges text across the boundary of an answer; use that of a Yi model"
            )
        is_target[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
    return EncodedTurns(input_ids, is_target)
