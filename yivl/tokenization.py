"""Prompt text to token ids and back. The only module that knows how an image slot becomes ``-200``."""

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

from yivl.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX, INTERNVL_TOKENS
from yivl.conversation import Control, Piece, PromptTemplate, Turn
from yivl.errors import CheckpointError
from yivl.files.json_files import read_json
from yivl.files.validation import library_errors

WORD_START: Final = "▁"
"""A space in the pieces of SentencePiece."""
_JSON_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES: Final = ("tokenizer.model", *_JSON_FILES)


class YiTokenizer(LlamaTokenizer):
    """Llama tokenizer with the ids and texts of SentencePiece, which the reference implementations use.

    A call parses control tokens in text, as the reference does; ``text_ids`` takes text as data. Decoding differs from
    the ``tokenizers`` library: SentencePiece keeps the valid characters of a run of byte tokens and drops a leading
    space, where the library turns the whole run into replacement characters and keeps the space.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # From transformers: the control and user-defined pieces of SentencePiece. Those of the files have another name.
        pieces = kwargs.pop("additional_special_tokens", [])
        super().__init__(*args, **kwargs)
        self.sp_model = SentencePieceProcessor(model_file=self.vocab_file)
        folder = Path(self.vocab_file).parent
        self.files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        """Contents of the files it was loaded from, by name."""
        self.added_ids = {token.content: index for index, token in self.added_tokens_decoder.items()}
        """Ids of the tokens that the files add to those of SentencePiece, or mark as control tokens."""
        special, size = set(self.all_special_tokens), self.sp_model.get_piece_size()
        roles = {self.bos_token, self.eos_token, self.unk_token, self.pad_token}
        self.spaced_tokens = {
            token
            for token, index in self.added_ids.items()
            if token not in special or (index >= size and token not in roles)
        }
        """Tokens that decoding puts spaces around. Source: transformers 4.37, PreTrainedTokenizer._decode."""
        # SentencePiece matches its user-defined pieces, such as <|im_sep|>, in the text of a call.
        self.add_tokens([piece for piece in pieces if not piece.special and piece.content not in self.added_ids])

    @cached_property
    def longest_piece(self) -> int:
        """Number of characters of the longest token."""
        return max(len(self.sp_model.id_to_piece(index)) for index in range(self.sp_model.get_piece_size()))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of text as data: a control token that is spelled out in it becomes ordinary pieces."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # unpaired surrogates
        # Below the added tokens, of which the library could leave out only those marked as special.
        return [token.id for token in self.backend_tokenizer.model.tokenize(text.replace(" ", WORD_START))]

    def control_id(self, token: str) -> int:
        """Return the id of a control token.

        Raises:
            CheckpointError: If the vocabulary has no such token.
        """
        index = self.convert_tokens_to_ids(token)
        if index is None or (index == self.unk_token_id and token != self.unk_token):
            raise CheckpointError(
                f"the tokenizer has no token {token!r}, which the prompt needs; use the tokenizer of the model"
            )
        return int(index)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> tuple[str, ...]:
        """Write the files that were loaded."""
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
        texts: list[str] = []
        for is_spaced, group in groupby(tokens, key=self.spaced_tokens.__contains__):
            run = list(group)
            texts += run if is_spaced else [self._run_text(run, special)]
        return " ".join(text for index, text in enumerate(texts) if text or index == len(texts) - 1)

    def _run_text(self, tokens: list[str], special: Collection[str]) -> str:
        """Return the text of neighboring tokens, none of them with spaces around it."""
        if tokens[0].startswith(WORD_START):
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


def add_image_tokens(tokenizer: YiTokenizer) -> YiTokenizer:
    """Return the tokenizer with the nine tokens of InternVL, those it does not have with ids after its vocabulary.

    They are special, as the training program of InternVL adds them; saving the tokenizer writes them.
    """
    new = [token for token in INTERNVL_TOKENS if token not in tokenizer.added_ids]
    if not new:
        return tokenizer
    first = max(tokenizer.sp_model.get_piece_size() - 1, *tokenizer.added_ids.values()) + 1
    ids = {token: first + index for index, token in enumerate(new)}
    config, special, added = (json.loads(tokenizer.files.get(name, b"{}")) for name in _JSON_FILES)
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    known = {str(index): tokenizer.added_tokens_decoder[index].__getstate__() for index in tokenizer.added_ids.values()}
    config["added_tokens_decoder"] = {
        **known,
        **(config.get("added_tokens_decoder") or {}),
        **{str(index): {"content": token, "special": True, **flags} for token, index in ids.items()},
    }
    names = "additional_special_tokens"
    config[names] = [*(config.get(names) or ()), *new]
    special[names] = [*(special.get(names) or ()), *({"content": token, **flags} for token in new)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name, fields in zip(_JSON_FILES, (config, special, added | ids), strict=True):
            text = json.dumps(fields, ensure_ascii=False, indent=2, sort_keys=True)
            (Path(folder) / name).write_text(f"{text}\n", encoding="utf-8")
        return load_tokenizer(folder)


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
    # The id of an image slot's text is never an input: an export to SGLang has it after the vocabulary.
    added = (index for token, index in tokenizer.added_ids.items() if token != DEFAULT_IMAGE_TOKEN)
    largest = max(*vocabulary.values(), *added, tokenizer.sp_model.get_piece_size() - 1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has the id {largest}; expected less than vocab_size, {vocab_size}"
        )


def check_control_tokens(folder: str | os.PathLike[str], tokenizer: YiTokenizer, template: PromptTemplate) -> None:
    """Check that a tokenizer has the control tokens of a prompt template.

    Args:
        folder: Of the tokenizer, for the error.
        tokenizer: Loaded from the folder.
        template: Of the model.

    Raises:
        CheckpointError: If one is missing.
    """
    for token in sorted(template.control_tokens):
        with library_errors(folder):
            tokenizer.control_id(token)


def read_sentencepiece(path: Path) -> SentencePieceProcessor:
    """Return the SentencePiece model in a ``tokenizer.model``.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        return SentencePieceProcessor(model_file=os.fspath(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model, or a git-lfs pointer; download it again") from error


def tokenize(pieces: Iterable[Piece], tokenizer: YiTokenizer) -> list[int]:
    """Return the ids of the pieces of a prompt, ``-200`` at image slots.

    Text between control tokens and image slots is tokenized as one, as in the reference, and always as data.

    Raises:
        CheckpointError: If the tokenizer has not all control tokens of the template.
    """
    return [token for token, _ in _encode(((piece, False) for piece in pieces), tokenizer)]


def _encode(pieces: Iterable[tuple[Piece, bool]], tokenizer: YiTokenizer) -> Iterator[tuple[int, bool]]:
    """Yield the ids of pieces, each with the flag of its piece."""
    for is_text, group in groupby(pieces, key=lambda pair: isinstance(pair[0], str)):
        run = list(group)
        if is_text:
            yield from _encode_text([(str(text), flag) for text, flag in run], tokenizer)
        else:
            yield from ((_id_of(piece, tokenizer), flag) for piece, flag in run)


def _encode_text(texts: Iterable[tuple[str, bool]], tokenizer: YiTokenizer) -> Iterator[tuple[int, bool]]:
    """Yield the ids of texts that are tokenized as one, each with the flag of its text."""
    prefixes, flags = [""], []
    for flag, group in groupby(texts, key=lambda pair: pair[1]):
        flags.append(flag)
        prefixes.append(prefixes[-1] + "".join(text for text, _ in group))
    ids, num_known = tokenizer.text_ids(prefixes[-1]), 0
    for prefix, flag in zip(prefixes[1:], flags, strict=True):
        begun = ids if prefix == prefixes[-1] else tokenizer.text_ids(prefix)
        if ids[: len(begun)] != begun:
            raise CheckpointError(
                "tokenizer.model: merges text across the boundary of an answer; use that of a Yi model"
            )
        yield from ((token, flag) for token in begun[num_known:])
        num_known = len(begun)


def _id_of(piece: Piece, tokenizer: YiTokenizer) -> int:
    return tokenizer.control_id(piece.token) if isinstance(piece, Control) else IMAGE_TOKEN_INDEX


def stop_id(template: PromptTemplate, tokenizer: YiTokenizer) -> int:
    """Return the id that ends an answer."""
    return int(tokenizer.eos_token_id) if template.stop_token is None else tokenizer.control_id(template.stop_token)


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
    # verbose=False: callers check the sequence length after fusion, image patches included.
    settings = {"add_special_tokens": False, "verbose": False}
    texts = prompt.encode("utf-8", "replace").decode("utf-8").split(DEFAULT_IMAGE_TOKEN)  # unpaired surrogates
    first, *rest = (tokenizer(text, **settings).input_ids for text in texts)
    skipped = int(first[:1] == [tokenizer.bos_token_id])
    ids = first + [token for chunk in rest for token in [image_token_index, *chunk[skipped:]]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


@dataclass(frozen=True)
class EncodedTurns:
    """A tokenized conversation whose turns all have answers."""

    input_ids: list[int]
    """Token ids, ``-200`` at image slots."""
    is_target: list[bool]
    """Whether the loss is computed on a token: each answer and what ends it."""


def encode_turns(
    turns: Sequence[Turn],
    tokenizer: YiTokenizer,
    template: PromptTemplate,
    system: str | None = None,
    questions: Sequence[Sequence[str]] = (),
) -> EncodedTurns:
    """Return the ids of answered turns and the tokens the loss is computed on.

    The ids before an answer equal the prompt of ``Chat`` token for token. This is checked: a tokenizer that merges
    text across that boundary would train on one prompt and answer another.

    Args:
        turns: Oldest first.
        tokenizer: Of the model.
        template: Of the model.
        system: System message; by default that of the template.
        questions: As they are written, see ``PromptTemplate.messages``.

    Raises:
        ValueError: If a turn has no answer.
        CheckpointError: If the tokenizer merges text across the boundary of an answer, or lacks a control token.
    """
    for index, turn in enumerate(turns):
        if turn.answer is None:
            raise ValueError(f"turn {index} has no answer")
    pieces = template.render_targets(template.messages(turns, questions), system)
    encoded = list(_encode(pieces, tokenizer))
    return EncodedTurns([token for token, _ in encoded], [flag for _, flag in encoded])
