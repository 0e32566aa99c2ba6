"""The answers of the recorded three-turn chat, through ``Chat``."""

import pytest
from support.golden import GOLDEN, golden_json

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.chat import Chat

RECORDED = golden_json("chat")


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_chat_answers_equal_the_reference(reuse_cache: bool, square_loaded: LoadedModel) -> None:
    chat = Chat(square_loaded, reuse_cache=reuse_cache)
    cached = []
    for index, turn in enumerate(RECORDED["turns"]):
        image = None if index else GOLDEN / "images" / RECORDED["image"]
        answer = chat.ask(turn["question"], image, temperature=0, max_new_tokens=RECORDED["max_new_tokens"])
        assert answer == turn["answer"]
        assert chat.last_answer is not None
        assert chat.last_answer.new_tokens == len(turn["generated_ids"])
        assert chat.last_answer.prompt_tokens == len(turn["input_ids"]) + 15  # one id became 16 patches
        cached.append(chat.last_answer.cached_tokens)
    prompts = [len(turn["input_ids"]) + 15 for turn in RECORDED["turns"]]
    assert cached == ([0, *prompts[:2]] if reuse_cache else [0, 0, 0])
