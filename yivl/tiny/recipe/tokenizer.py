"""A small bilingual SentencePiece tokenizer with the settings and special ids of Yi's."""

import io
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sentencepiece

from yivl.conversation import YI_VL, Turn, prompt_text
from yivl.tiny.world import words
from yivl.tiny.world.language import dialogue
from yivl.tiny.world.scenes import sample_scene
from yivl.tiny.world.words import KINDS, LANGUAGES, Word

_SETTINGS: Final = Path(__file__).parents[1] / "assets" / "yi-vl-tiny"
VOCAB_SIZE: Final = 1600
_CONTROL: Final = ("<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
"""Ids 3 to 8. Source: 01-ai/Yi-VL-6B, tokenizer.model."""
PATCH_WORDS: Final[tuple[Word, ...]] = (
    *KINDS,
    *words.ACTIVITIES,
    *words.PLACES,
    *words.COLORS,
    *(Word(text, text) for text in (*words.SIGN_WORDS, *"0123456789")),
    *(words.SIGN, words.WALL, words.FLOOR, words.FIRST, words.SECOND),
)
"""All labels of a patch; each is a single token in either language."""


def train_tokenizer(folder: Path) -> None:
    """Train a BPE tokenizer on texts of the world and write it with the settings of the shipped tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
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
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(_SETTINGS / name, folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def token_ids(word: Word, tokenizer: Any) -> list[int]:
    """Return the token ids of a word in both languages.

    Raises:
        ValueError: If one of its forms is not a single token.
    """
    pieces = _pieces(word)
    ids = [tokenizer.sp_model.piece_to_id(piece) for piece in pieces]
    if tokenizer.sp_model.unk_id() in ids:
        raise ValueError(f"no token for one of {pieces}")
    return ids


def _pieces(word: Word) -> list[str]:
    """Return the forms of a word as pieces: English with a leading space and its plural; Chinese and digits as is."""
    if not (word.en.isalpha() and word.en.isascii()):
        return [word.zh]
    plurals = {kind.en: kind.plural for kind in KINDS}
    return list(dict.fromkeys([word.zh, f"▁{word.en}", f"▁{plurals.get(word.en, word.en)}"]))


def _sentences() -> Iterator[str]:
    """Yield the training text of the tokenizer: whole prompts in English, single words in Chinese.

    Chinese has no spaces: trained on sentences, "three cats" would become one token.
    """
    for word in PATCH_WORDS:
        yield from [piece.replace("▁", " ") for piece in _pieces(word)] * 400
    chinese = {word.zh for word in (*PATCH_WORDS, *words.NUMBERS)} | {kind.measure for kind in KINDS}
    known = sorted(sorted(chinese), key=len, reverse=True)
    yield from known * 400
    pattern = re.compile("|".join(known))
    rng = random.Random("tokenizer")
    for number in range(4000):
        language = LANGUAGES[number % 2]
        questions = dialogue(sample_scene("train", number), language, rng, length=6)
        if language == "en":
            # A Chinese sign text stays one token, with or without a space before it.
            turns = [Turn(question.text, question.answer) for question in questions if question.answer.isascii()]
            yield from prompt_text(YI_VL.render(YI_VL.messages(turns))).splitlines()
        else:
            for question in questions:
                yield from filter(None, pattern.split(question.text + question.answer))
