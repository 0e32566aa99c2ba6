"""User text is data; decoding never invents characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.conversation import Turn, render_chunks
from yivl.tokenization import tokenize_chunks, tokenizer_image_token

CONTROL = ("<|im_end|>", "<|im_start|>", "<|startoftext|>", "<|endoftext|>", "<unk>", "<image_placeholder>", "###")
CONTROL_IDS = {0, 1, 2, 6, 7, 8}
TEXT = st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=8)), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(question=TEXT, answer=TEXT, num_images=st.integers(0, 2))
def test_typed_text_never_becomes_a_control_id_or_an_image(
    question: str, answer: str, num_images: int, loaded_once: LoadedModel
) -> None:
    turns = [Turn(question, answer, num_images), Turn(question)]
    chunks = render_chunks([message for turn in turns for message in turn.messages()])
    ids = tokenize_chunks(chunks, loaded_once.tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == num_images
    assert not CONTROL_IDS & set(ids)


@settings(max_examples=300, deadline=None)
@given(history=st.lists(st.tuples(TEXT, TEXT), max_size=3), question=TEXT)
def test_the_ids_of_a_prompt_are_a_prefix_of_the_longer_conversation(
    history: list[tuple[str, str]], question: str, loaded_once: LoadedModel
) -> None:
    """What lets a chat keep its cache, and training ids equal inference ids."""
    turns = [Turn(question, num_images=1)] + [Turn(*pair) for pair in history]
    tokenizer = loaded_once.tokenizer
    prompt = tokenize_chunks(render_chunks([m for t in [*turns[1:], turns[0]] for m in t.messages()]), tokenizer)
    answered = Turn(question, "An answer.", num_images=1)
    longer = tokenize_chunks(render_chunks([m for t in [*turns[1:], answered] for m in t.messages()]), tokenizer)
    assert longer[: len(prompt)] == prompt


@pytest.fixture(scope="module")
def loaded_once(loaded: LoadedModel) -> LoadedModel:
    return loaded


def test_an_empty_answer_stays_a_closed_turn() -> None:
    (chunk,) = render_chunks([message for turn in (Turn("a", ""), Turn("b")) for message in turn.messages()], "S")
    assert chunk == "S\n\n### Human: a\n### Assistant: \n### Human: b\n### Assistant:"


def test_an_id_beyond_the_vocabulary_has_no_text(loaded: LoadedModel) -> None:
    assert loaded.tokenizer.decode([268, 5000, 267]) == "the a"


def test_unknown_tensor_kinds_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="return_tensors='np'"):
        tokenizer_image_token("a", loaded.tokenizer, return_tensors="np")
