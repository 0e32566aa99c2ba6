"""Conversations with InternVL-Chat through ``Chat``: the recorded answers, and what ends an answer."""

from typing import Any

import pytest
from support.golden_internvl import CHECKPOINT, golden_json, golden_model, pixels_of

from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import HERMES_2
from yivl.inference.chat import Chat
from yivl.inference.sampling import Sampling
from yivl.serve.terminal import Terminal
from yivl.serve.transcript import as_json, as_markdown
from yivl.tokenization import load_tokenizer

RECORDED = golden_json("chat")
CHATS = {chat["id"]: chat for chat in RECORDED["chats"]}
GREEDY = {"temperature": 0, "max_new_tokens": RECORDED["max_new_tokens"]}
TYPED = "literal_im_end"
"""A control token in the question becomes its id in the original."""
IN_FRONT = [
    *("img_en", "img_zh", "img_en_other_image", "text_en", "text_zh"),
    *("text_turn_then_image", "release_system", "odd_text", TYPED),
]
"""Chats whose images come first in their turn; the places of all others are tested as prompts."""
NUM_PATCHES = 9


@pytest.fixture(scope="module")
def internvl() -> LoadedModel:
    processor: Any = None  # images are given as pixel values
    return LoadedModel(golden_model(), load_tokenizer(CHECKPOINT), processor, "InternVL-golden")


@pytest.mark.parametrize("reuse_cache", [True, False])
@pytest.mark.parametrize("name", IN_FRONT)
def test_chat_answers_equal_the_original(name: str, reuse_cache: bool, internvl: LoadedModel) -> None:
    recorded = CHATS[name]
    system = None if recorded["system_message"] == HERMES_2.system else recorded["system_message"]
    chat = Chat(internvl, system=system, reuse_cache=reuse_cache)
    shown: list[str] = []
    for turn in recorded["turns"]:
        new, shown = turn["images"][len(shown) :], turn["images"]
        pixels = pixels_of(new)
        question = turn["question"].removeprefix("<image>\n")
        answer = chat.ask(question, [] if pixels is None else list(pixels), **GREEDY)
        assert chat.last_answer is not None
        ids = turn["input_ids"]
        if name == TYPED:
            assert chat.last_answer.prompt_tokens > len(ids)
            continue
        assert answer == turn["response"]
        assert chat.last_answer.new_tokens == len(turn["generated_ids"])
        assert chat.last_answer.prompt_tokens == len(ids)
        assert chat.last_answer.finish_reason == {"eos": "stop", "length": "length"}[turn["finish"]]
    assert [turn.question for turn in chat.turns] == [
        turn["question"].removeprefix("<image>\n") for turn in recorded["turns"]
    ]


def test_only_im_end_ends_an_answer(internvl: LoadedModel) -> None:
    state = Chat(internvl).begin("Hi.", **GREEDY)
    text = "".join(map(state.take, [*internvl.tokenizer.text_ids("one ### two"), 2]))
    assert state.finish_reason is None
    text += state.take(7)
    assert (state.finish_reason, state.text, text) == ("stop", "one ### two <|endoftext|>", state.text)


def test_the_stop_token_has_no_text_whatever_the_end_of_the_tokenizer_is(internvl: LoadedModel) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    tokenizer.eos_token = "<|endoftext|>"
    other = LoadedModel(internvl.model, tokenizer, internvl.image_processor, internvl.name)
    recorded = CHATS["text_zh"]["turns"][0]
    assert Chat(other).ask(recorded["question"], **GREEDY) == recorded["response"]


def test_beams_end_at_im_end(internvl: LoadedModel) -> None:
    recorded = CHATS["text_zh"]["turns"][0]
    chat = Chat(internvl)
    chat.ask(recorded["question"], num_beams=2, **GREEDY)
    assert chat.last_answer is not None
    assert chat.last_answer.finish_reason == "stop"
    assert chat.last_answer.new_tokens < RECORDED["max_new_tokens"]
    config = Sampling(num_beams=2).generation_config(internvl.tokenizer, 5, 7)
    assert config.eos_token_id == 7


def test_a_chat_has_the_system_message_and_the_names_of_its_template(internvl: LoadedModel) -> None:
    chat = Chat(internvl)
    assert chat.system == HERMES_2.system
    assert Chat(internvl, system="").system == ""
    asked: list[str] = []

    def read_line(prompt: str) -> str:
        asked.append(prompt)
        return "/exit"

    Terminal(chat, {}, read_line=read_line).run()
    assert asked == ["user: "]
    chat.ask("你好", **GREEDY)
    assert "**user**" in as_markdown(chat, {})
    assert HERMES_2.system in as_json(chat, {})
