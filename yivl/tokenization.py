"""Prompt text to token ids and back. The only place that knows how an image slot becomes ``-200``."""

import os
import shutil
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

_WORD_START = "▁"
_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class YiTokenizer(LlamaTokenizer):  # type: ignore[misc]
    """Llama tokenizer that decodes exactly as the release did.

    The ``tokenizers`` decoder turns a whole run of byte tokens into replacement characters when one of them is
    invalid and keeps a leading blank; SentencePiece, which the release used, keeps the valid ones and drops it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sp_model = SentencePieceProcessor(model_file=self.vocab_file)

    @cached_property
    def longest_piece(self) -> int:
        """Characters of the longest token."""
        return max(len(self.sp_model.id_to_piece(index)) for index in range(self.sp_model.get_piece_size()))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> tuple[str, ...]:
        """Copy the tokenizer files as they were loaded: Yi-VL adds no tokens, and every reader knows these files."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        source = Path(self.vocab_file).parent
        names = [name for name in _FILES if (source / name).is_file()]
        if "tokenizer.model" not in names:
            raise CheckpointError(f"{source}: the tokenizer files this model was loaded with are gone")
        if source.resolve() != target.resolve():
            for name in names:
                shutil.copyfile(source / name, target / name)
        return tuple(str(target / name) for name in names)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        tokens = self.convert_ids_to_tokens([token_ids] if isinstance(token_ids, int) else token_ids)
        tokens = [token for token in tokens if token is not None]  # an id of a padded vocabulary has no text
        special = set(self.all_special_tokens)
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in special]
        if tokens and tokens[0].startswith(_WORD_START):
            tokens[0] = tokens[0][1:]
        text, after_special = "", False
        run: list[str] = []
        for index, token in enumerate(tokens):
            if token in special:
                # A blank in front of the text run before a special token: a quirk of the release (golden vectors).
                text += (" " if index and not after_special else "") + self.sp_model.decode(run) + token
                run, after_special = [], True
            else:
                run.append(token)
                after_special = False
        return text + str(self.sp_model.decode(run))


def load_tokenizer(folder: str | os.PathLike[str]) -> YiTokenizer:
    """Return the tokenizer of a checkpoint folder.

    ``add_prefix_space=False`` follows from the SentencePiece model (no dummy prefix); without it most texts tokenize
    differently from the release.

    Raises:
        CheckpointError: If the folder has no ``tokenizer.model``, or a damaged one.
    """
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model; a Yi-VL checkpoint folder holds one")
    try:
        SentencePieceProcessor(model_file=os.fspath(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model, or a git-lfs pointer; download it again") from error
    return YiTokenizer.from_pretrained(os.fspath(folder), add_prefix_space=False)  # type: ignore[no-any-return]


def tokenize_chunks(chunks: Sequence[str], tokenizer: Any, *, text_is_data: bool = True) -> list[int]:
    """Return the ids of prompt chunks, ``-200`` between neighbours.

    Every chunk is tokenized on its own, as in the release. With ``text_is_data`` a special token spelled out in the
    text, such as ``<|im_end|>``, stays ordinary text; without, it becomes its control id as in the release.
    """
    parts: list[list[int]] = []
    for chunk in chunks:
        text = chunk.encode("utf-8", "replace").decode("utf-8")  # halves of characters, from a broken encoding
        # verbose=False: the length that counts is that of the fused sequence, which the callers check.
        settings = {"add_special_tokens": False, "split_special_tokens": text_is_data, "verbose": False}
        parts.append(tokenizer(text, **settings).input_ids)
    return join_chunks(parts)


def join_chunks(parts: Sequence[Sequence[int]]) -> list[int]:
    """Return the ids of chunks as one prompt, ``-200`` between neighbours."""
    first, *rest = parts
    return [*first, *(token for part in rest for token in (IMAGE_TOKEN_INDEX, *part))]


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Return the ids of a prompt that spells its image slots ``<image_placeholder>``, exactly as the release does.

    Special tokens in the text become control ids. A prompt that opens with the literal ``<|startoftext|>`` loses the
    first token of every later chunk: a bug of the release, kept because callers of this function compare ids with it.

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
    """A finished conversation in tokens."""

    input_ids: list[int]
    """With ``-200`` at image slots."""
    is_target: list[bool]
    """True at each answer and the stop string that ends it, and nowhere else."""


def encode_turns(turns: Sequence[Turn], tokenizer: Any, system: str = SYSTEM_PROMPT) -> EncodedTurns:
    """Return the ids of finished turns and which of them the model learns to produce.

    The ids before an answer are, token for token, those that ``Chat`` would feed to have it generated; this is checked,
    because a tokenizer that joins text across that border would train one prompt and answer another.

    Raises:
        ValueError: If a turn has no answer.
        CheckpointError: If the tokenizer joins tokens across the beginning or the end of an answer.
    """

    @cache  # neighbouring prompts share most of their chunks
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
        # Up to the stop string, without the blank that leads to the next role.
        chunks = render_chunks(messages[:finished], system)
        answered = encode([*chunks[:-1], chunks[-1].removesuffix(" ")])
        if input_ids[: len(answered)] != answered or answered[: len(prompt)] != prompt:
            raise CheckpointError(
                "the tokenizer joins tokens across the border of an answer; use the tokenizer.model of a Yi model"
            )
        is_target[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
    return EncodedTurns(input_ids, is_target)
