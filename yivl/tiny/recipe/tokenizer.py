"""A small bilingual tokenizer, made the way that of Yi is made."""

import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sentencepiece

from yivl.conversation import Turn, render_chunks
from yivl.tiny.world.language import conversation
from yivl.tiny.world.scenes import sample_scene
from yivl.tiny.world.words import (
    ACTIVITIES,
    COLOURS,
    FIRST,
    FLOOR,
    KINDS,
    LANGUAGES,
    NUMBERS,
    PLACES,
    SECOND,
    SIGN,
    SIGN_WORDS,
    WALL,
    Word,
)

VOCAB_SIZE: Final = 1600
_CONTROL: Final = ("<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
"""Ids 3 to 8, as in the tokenizer of Yi (the published tokenizer.model)."""
WORDS: Final[tuple[Word, ...]] = (
    *KINDS,
    *ACTIVITIES,
    *PLACES,
    *COLOURS,
    *(Word(text, text) for text in SIGN_WORDS),
    *(Word(digit, digit) for digit in "0123456789"),
    SIGN,
    WALL,
    FLOOR,
    FIRST,
    SECOND,
)
"""All that a patch of a picture can be; each is one token in either language."""


def train_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.model`` and the two files beside it into a folder.

    Identity normalization, no dummy prefix, byte fallback, split digits, the same special ids: as the tokenizer of Yi.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        control_symbols=list(_CONTROL),
        minloglevel=2,
    )
    for name, content in _settings().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def token_ids(word: Word, tokenizer: Any) -> list[int]:
    """Return the ids of an idea's tokens in both languages.

    Raises:
        ValueError: If the tokenizer has no such tokens.
    """
    pieces = _pieces(word)
    ids = [tokenizer.sp_model.piece_to_id(piece) for piece in pieces]
    if tokenizer.sp_model.unk_id() in ids:
        raise ValueError(f"no token for one of {pieces}")
    return ids


def _pieces(word: Word) -> list[str]:
    """Return what an idea is called in tokens: English with its blank and its plural, Chinese and digits without."""
    if not (word.en.isalpha() and word.en.isascii()):
        return [word.zh]
    plurals = {kind.en: kind.plural for kind in KINDS}
    return list(dict.fromkeys([word.zh, f"▁{word.en}", f"▁{plurals.get(word.en, word.en)}"]))


def _sentences() -> Iterator[str]:
    """Yield what the merges are counted on: whole prompts in English, single words in Chinese.

    Chinese has no blanks: counted on sentences, "three cats" would become one token.
    """
    for word in WORDS:
        yield from [piece.replace("▁", " ") for piece in _pieces(word)] * 400
    known = sorted({word.zh for word in (*WORDS, *NUMBERS)} | {kind.measure for kind in KINDS}, key=len, reverse=True)
    yield from known * 400
    pattern = re.compile("|".join(known))
    rng = random.Random("tokenizer")
    for number in range(4000):
        language = LANGUAGES[number % 2]
        questions = conversation(sample_scene("train", number), language, rng, length=6)
        if language == "en":
            # A Chinese sign keeps its one token, with or without a blank before it.
            turns = [Turn(one.text, one.answer) for one in questions if one.answer.isascii()]
            yield from render_chunks([message for turn in turns for message in turn.messages()])[0].splitlines()
        else:
            for question in questions:
                yield from filter(None, pattern.split(question.text + question.answer))


def _settings() -> dict[str, dict[str, Any]]:
    tokens = ["<unk>", "<|startoftext|>", "<|endoftext|>", *_CONTROL[3:]]
    names = {"bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[0], "unk_token": tokens[0]}
    ids = [0, 1, 2, 6, 7, 8]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "special_tokens_map.json": {"additional_special_tokens": tokens, **names},
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {str(i): {"content": t, **flags} for i, t in zip(ids, tokens, strict=True)},
            "additional_special_tokens": tokens,
            **names,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 1024,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
        },
    }
