"""Prompts, ids and decodings of the reference."""

from typing import Any

import pytest
from support.golden import golden_json

from yivl import constants
from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import YI_VL, Turn, conv_templates
from yivl.tokenization import tokenize, tokenizer_image_token

TEXT = golden_json("prompts")


def by_id(case: dict[str, Any]) -> str:
    return str(case["id"])


def test_constants_are_those_of_the_reference(loaded: LoadedModel) -> None:
    assert TEXT["system"] == constants.SYSTEM_PROMPT
    assert TEXT["sep"] == constants.STOP_STRING
    assert TEXT["roles"] == [constants.HUMAN, constants.ASSISTANT]
    assert TEXT["image_token"] == constants.DEFAULT_IMAGE_TOKEN
    assert TEXT["image_token_index"] == constants.IMAGE_TOKEN_INDEX
    assert len(loaded.tokenizer) == TEXT["len_tokenizer"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded.tokenizer, name) == TEXT[name]


@pytest.mark.parametrize("case", TEXT["prompts"], ids=by_id)
def test_prompt_equals_the_reference(case: dict[str, Any]) -> None:
    conversation = conv_templates["mm_default"].copy()
    for message in case["messages"]:
        content = (message["content"], None, "Crop") if message["is_tuple"] else message["content"]
        conversation.append_message(message["role"], content)
    assert conversation.get_prompt() == case["prompt"]


@pytest.mark.parametrize("case", TEXT["prompts"], ids=by_id)
def test_ids_equal_the_reference(case: dict[str, Any], loaded: LoadedModel) -> None:
    assert tokenizer_image_token(case["prompt"], loaded.tokenizer) == case["input_ids"]


@pytest.mark.parametrize("case", TEXT["raw_tokenizer_image_token"], ids=lambda case: repr(case["text"]))
def test_raw_ids_equal_the_reference(case: dict[str, Any], loaded: LoadedModel) -> None:
    assert tokenizer_image_token(case["text"], loaded.tokenizer) == case["input_ids"]
    tensor = tokenizer_image_token(case["text"], loaded.tokenizer, return_tensors="pt")
    assert tensor.tolist() == case["input_ids"]


@pytest.mark.parametrize("case", TEXT["decode"], ids=range(len(TEXT["decode"])))
def test_decoding_equals_the_reference(case: dict[str, Any], loaded: LoadedModel) -> None:
    assert loaded.tokenizer.decode(case["ids"]) == case["decode"]
    assert loaded.tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"]


CHAT_TURNS = {
    "en_single_image": [Turn("What is in this image?", num_images=1)],
    "zh_single_image": [Turn("图片里有什么？", num_images=1)],
    "text_only_single": [Turn("Write a short poem about the moon and the sea.")],
    "text_only_multi_mixed": [Turn("请把 taxi 翻译成中文。", "出租车"), Turn("Now use it in a sentence, please.")],
}


@pytest.mark.parametrize("name", CHAT_TURNS)
def test_the_turns_of_a_chat_give_the_ids_of_the_reference(name: str, loaded: LoadedModel) -> None:
    expected = next(case["input_ids"] for case in TEXT["prompts"] if case["id"] == name)
    assert tokenize(YI_VL.render(YI_VL.messages(CHAT_TURNS[name])), loaded.tokenizer) == expected
